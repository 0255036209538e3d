"""Result rows: one per (run, budget, metric) in long format, stored as Parquet.

Rows of another schema are refused, never converted: a column that changed its meaning must not be averaged in.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bench.errors import BenchError, disk_error

SCHEMA = 2

# column → (type, may be missing)
COLUMNS: dict[str, tuple[pa.DataType, bool]] = {
    "schema": (pa.int32(), False),
    # which run
    "run": (pa.string(), False),
    "config_hash": (pa.string(), False),
    "settings": (pa.string(), False),  # JSON, dotted key → value: what makes a row of a table (without the seed)
    "method": (pa.string(), False),
    "reward": (pa.string(), False),
    "model": (pa.string(), False),
    "beta": (pa.float64(), False),
    "prompts": (pa.string(), False),  # name of the prompt set
    "evaluation": (pa.string(), False),  # hash of what was sampled to measure: prompts, noise, sampler, features
    "seed": (pa.int64(), False),
    "budget": (pa.int64(), False),
    "budget_unit": (pa.string(), False),  # "updates"
    # what was measured; a failed run is one row with status "failed" and the reason as its note
    "metric": (pa.string(), False),
    "metric_version": (pa.int32(), False),
    "value": (pa.float64(), True),
    "prior": (pa.float64(), True),
    "difference": (pa.float64(), True),
    "standard_error": (pa.float64(), True),  # of the difference; of the value where there is no difference
    "degrees": (pa.float64(), True),  # of freedom, of the standard error
    "n": (pa.int64(), False),
    "direction": (pa.string(), False),  # "higher", "lower" or "none"
    "unit": (pa.string(), False),
    "note": (pa.string(), False),
    "status": (pa.string(), False),  # "ok", "refused" (no value, the note says why), "failed" or RANDOM
    # with what
    "revision": (pa.string(), False),
    "dirty": (pa.bool_(), True),  # None outside a git checkout
    "packages": (pa.string(), False),  # JSON, name → version
    "hardware": (pa.string(), False),
    # at what cost, up to this budget
    "updates": (pa.int64(), False),
    "reward_calls": (pa.int64(), False),
    "reward_gradients": (pa.int64(), False),
    "network_forwards": (pa.int64(), False),
    "network_backwards": (pa.int64(), False),
    "wall_seconds": (pa.float64(), False),
    "train_seconds": (pa.float64(), False),
    "peak_memory_bytes": (pa.int64(), False),
}
TYPES = pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()])
RANDOM = "random weights"  # a trial of the code on weights that mean nothing: never part of a comparison
FINGERPRINT = "model.fingerprint"  # among the settings, where a model has weights: of these, precision and guidance
REPEATED = ["settings", "packages", "hardware"]  # long, and equal in many rows
STORED = pa.schema(
    [(name, pa.dictionary(pa.int32(), kind) if name in REPEATED else kind) for name, (kind, _) in COLUMNS.items()]
)
DIRECTIONS = ("higher", "lower", "none")
STATUSES = ("ok", "refused", "failed", RANDOM)


class RowsError(BenchError, ValueError):
    """A file that holds no rows of this version."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows (all columns but `schema`, which is filled in) so that `path` holds all of them or stays as it was.

    Raises ValueError for missing, unknown, mistyped or empty columns, and for an unknown direction or status.
    """
    rows = [{"schema": SCHEMA, **row} for row in rows]
    for row in rows:
        missing, unknown = COLUMNS.keys() - row.keys(), row.keys() - COLUMNS.keys()
        empty = [name for name, (_, optional) in COLUMNS.items() if not optional and row.get(name, "") is None]
        for fault, names in (("missing", missing), ("unknown", unknown), ("empty", empty)):
            if names:
                raise ValueError(f"row of metric {row.get('metric')!r}: {fault} columns {', '.join(sorted(names))}")
        for name, allowed in (("direction", DIRECTIONS), ("status", STATUSES)):
            if row[name] not in allowed:
                raise ValueError(f"row of metric {row['metric']!r}: {name} {row[name]!r} is none of {allowed}")
    try:
        table = pa.Table.from_pylist(rows, TYPES)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"a row holds a value of the wrong type: {error}") from error
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_rows(source: Path | Iterable[Path]) -> pd.DataFrame:
    """All rows of a file, of several, or of every Parquet file below a folder, in the order of their paths.

    Raises FileNotFoundError when there is none, RowsError for a file of another schema or a broken one.
    """
    below = ""
    if isinstance(source, Path):
        below = f" below {source}"
        source = sorted(path for path in source.rglob("*.parquet") if path.is_file()) if source.is_dir() else [source]
    paths = list(source)
    if not paths:
        raise FileNotFoundError(f"no result rows found{below}: there is no .parquet file to read")
    return pd.concat([_read(path) for path in paths], ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pq.ParquetFile(path, read_dictionary=REPEATED).read()
        schemas = set(table["schema"].to_pylist()) if "schema" in table.column_names else {"unknown"}
    except (pa.ArrowException, OSError, KeyError) as error:  # the last: a column is missing
        if number := getattr(error, "errno", None):
            raise RowsError(disk_error(OSError(number, os.strerror(number), str(path))).rstrip(".")) from None
        reason = str(error).splitlines()[0]
        raise RowsError(f"{path} cannot be read ({reason}): remove it, and the run's command writes it again") from None
    if schemas - {SCHEMA} or sorted(table.column_names) != sorted(COLUMNS):
        versions = ", ".join(sorted(map(str, schemas)))
        raise RowsError(
            f"{path} holds rows of schema {versions}, this version reads schema {SCHEMA}: "
            "run the benchmark again or read it with the version that wrote it"
        )
    try:
        table = table.select(list(COLUMNS)).cast(STORED)
        _check_values(table)
    except (pa.ArrowException, ValueError) as error:
        raise RowsError(f"{path} holds no rows of this version: {error}") from None
    return table.to_pandas().astype(dict.fromkeys(REPEATED, object))  # one string each, however many rows


def _check_values(table: pa.Table) -> None:
    """Raise ValueError for an empty cell where there must be none, or a word or a JSON text that is none."""
    for name, (_, optional) in COLUMNS.items():
        if not optional and table[name].null_count:
            raise ValueError(f"column {name} has empty cells")
    for name, allowed in (("direction", DIRECTIONS), ("status", STATUSES)):
        if strange := set(table[name].unique().to_pylist()) - set(allowed):
            raise ValueError(f"{name} {strange.pop()!r} is none of {allowed}")
    for name in ("settings", "packages"):
        if not all(isinstance(json.loads(text), dict) for text in table[name].unique().to_pylist()):
            raise ValueError(f"column {name} holds no JSON objects")
