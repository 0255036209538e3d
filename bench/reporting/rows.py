"""Result rows: one per (run, budget, metric) in long format, stored as Parquet.

Rows of another schema are refused, never converted: a column that changed its meaning must not be averaged in. Of
schema 2 nothing changed but that two columns are new, and they are filled in.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.errors import BenchError, disk_error
from bench.renames import current_metric

SCHEMA = 3

# metric → its `support` and `prior_is_best`, in rows of schema 2; those of others: "real" and false
SCHEMA_2: dict[str, tuple[str, bool]] = {
    "coverage": ("share", True),
    "diversity": ("positive", True),
    "diversity_clip": ("positive", True),
    "diversity_dreamsim": ("positive", True),
    "fid_prior": ("positive", True),
    "fid_prior_per_prompt": ("positive", True),
    "fid_target": ("positive", False),
    "kid_prior": ("real", True),
    "output_norm": ("positive", False),
    "path_kl": ("positive", True),
    "path_kl_steps": ("positive", True),
    "sampler_gap": ("positive", True),
    "tilt_sw2": ("positive", False),
    "tilt_tv": ("share", False),
    "vendi": ("positive", True),
}


class Column(NamedTuple):
    """A column's type, what holds of it when a run is evaluated or done again, and whether it may be missing.

    check: "same" is equal again, "near" agrees to rounding or noise; "counted" is equal where the run is trained again,
    and "named" where its configuration is the stored one; "reported" depends on the machine and the time.
    """

    type: pa.DataType
    check: Literal["same", "near", "counted", "named", "reported"]
    optional: bool = False


COLUMNS: dict[str, Column] = {
    "schema": Column(pa.int32(), "same"),
    # which run
    "run": Column(pa.string(), "named"),
    "config_hash": Column(pa.string(), "named"),
    "settings": Column(pa.string(), "same"),  # JSON, dotted key → value: what makes a row of a table (without the seed)
    "method": Column(pa.string(), "same"),
    "reward": Column(pa.string(), "same"),
    "model": Column(pa.string(), "same"),
    "beta": Column(pa.float64(), "same"),
    "prompts": Column(pa.string(), "same"),  # name of the prompt set
    "evaluation": Column(pa.string(), "same"),  # hash of what was sampled to measure: prompts, noise, sampler, features
    "seed": Column(pa.int64(), "same"),
    "budget": Column(pa.int64(), "same"),
    "budget_unit": Column(pa.string(), "same"),  # "updates"
    # what was measured; a failed run is one row with status "failed" and the reason as its note
    "metric": Column(pa.string(), "same"),
    "metric_version": Column(pa.int32(), "same"),
    "value": Column(pa.float64(), "near", optional=True),
    "prior": Column(pa.float64(), "near", optional=True),
    "difference": Column(pa.float64(), "near", optional=True),
    # of the difference; of the value where there is no difference
    "standard_error": Column(pa.float64(), "near", optional=True),
    "degrees": Column(pa.float64(), "near", optional=True),  # of freedom, of the standard error
    "n": Column(pa.int64(), "same"),
    "direction": Column(pa.string(), "same"),  # "higher", "lower" or "none"
    "support": Column(pa.string(), "same"),  # one of SUPPORTS: the values that the metric can take
    "prior_is_best": Column(pa.bool_(), "same"),  # whether it counts what training lost (see `bench.metric.Metric`)
    "unit": Column(pa.string(), "same"),
    "note": Column(pa.string(), "reported"),  # it may quote numbers, and what was seen in training
    "status": Column(pa.string(), "same"),  # "ok", "refused" (no value, the note says why), "failed" or RANDOM
    # with what
    "revision": Column(pa.string(), "reported"),
    "dirty": Column(pa.bool_(), "reported", optional=True),  # None outside a git checkout
    "packages": Column(pa.string(), "reported"),  # JSON, name → version
    "hardware": Column(pa.string(), "reported"),
    # at what cost, up to this budget
    "updates": Column(pa.int64(), "same"),
    "reward_calls": Column(pa.int64(), "counted"),
    "reward_gradients": Column(pa.int64(), "counted"),
    "network_forwards": Column(pa.int64(), "counted"),
    "network_backwards": Column(pa.int64(), "counted"),
    "wall_seconds": Column(pa.float64(), "reported"),
    "train_seconds": Column(pa.float64(), "reported"),
    "peak_memory_bytes": Column(pa.int64(), "reported"),
}
TYPES = pa.schema([(name, column.type) for name, column in COLUMNS.items()])
RANDOM = "random weights"  # a trial of the code on weights that mean nothing: never part of a comparison
FINGERPRINT = "model.fingerprint"  # among the settings, where a model has weights: of these, precision and guidance
REPEATED = ["settings", "packages", "hardware"]  # long, and equal in many rows
STORED = pa.schema(
    [(name, pa.dictionary(pa.int32(), c.type) if name in REPEATED else c.type) for name, c in COLUMNS.items()]
)
DIRECTIONS = ("higher", "lower", "none")
SUPPORTS = ("real", "positive", "share")
STATUSES = ("ok", "refused", "failed", RANDOM)
WORDS = {"direction": DIRECTIONS, "support": SUPPORTS, "status": STATUSES}


class RowsError(BenchError, ValueError):
    """A file that holds no rows of this version."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows (all columns but `schema`, which is filled in) so that `path` holds all of them or stays as it was.

    Raises ValueError for missing, unknown, mistyped or empty columns, for an unknown direction or status, and for NaN
    or an infinity: what is missing is None.
    """
    rows = [{"schema": SCHEMA, **row} for row in rows]
    for row in rows:
        missing, unknown = COLUMNS.keys() - row.keys(), row.keys() - COLUMNS.keys()
        empty = [name for name, column in COLUMNS.items() if not column.optional and row.get(name, "") is None]
        for fault, names in (("missing", missing), ("unknown", unknown), ("empty", empty)):
            if names:
                raise ValueError(f"row of metric {row.get('metric')!r}: {fault} columns {', '.join(sorted(names))}")
        for name, allowed in WORDS.items():
            if row[name] not in allowed:
                raise ValueError(f"row of metric {row['metric']!r}: {name} {row[name]!r} is none of {allowed}")
    try:
        table = pa.Table.from_pylist(rows, TYPES)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"a row holds a value of the wrong type: {error}") from error
    _check_finite(path, table)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_rows(source: Path | Iterable[Path]) -> pd.DataFrame:
    """All rows of a file, of several, or of every Parquet file below a folder, in the order of their paths.

    What is missing is NaN in the frame. Raises FileNotFoundError when there is none, RowsError for a file of another
    schema, a broken one, or one that holds NaN or an infinity itself.
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
    if schemas == {2} and not {"support", "prior_is_best"} & set(table.column_names):
        table, schemas = _from_schema_2(table), {SCHEMA}
    if schemas - {SCHEMA} or sorted(table.column_names) != sorted(COLUMNS):
        versions = ", ".join(sorted(map(str, schemas)))
        raise RowsError(
            f"{path} holds rows of schema {versions}, this version reads schema {SCHEMA}: "
            "run the benchmark again or read it with the version that wrote it"
        )
    try:
        table = _with_current_metrics(table.select(list(COLUMNS)).cast(STORED))
        _check_values(table)
    except (pa.ArrowException, ValueError) as error:
        raise RowsError(f"{path} holds no rows of this version: {error}") from None
    _check_finite(path, table)
    return table.to_pandas().astype(dict.fromkeys(REPEATED, object))  # one string each, however many rows


def _from_schema_2(table: pa.Table) -> pa.Table:
    """The table with the columns that schema 2 lacks."""
    bases = [name.partition("/")[0] for name in table["metric"].to_pylist()]
    support, best = zip(*(SCHEMA_2.get(base, ("real", False)) for base in bases), strict=True) if bases else ((), ())
    table = table.append_column("support", pa.array(support, pa.string()))
    table = table.append_column("prior_is_best", pa.array(best, pa.bool_()))
    return table.set_column(table.column_names.index("schema"), "schema", pa.array([SCHEMA] * len(bases), pa.int32()))


def _with_current_metrics(table: pa.Table) -> pa.Table:
    """The table with the metrics' names of this version."""
    names = pc.dictionary_encode(table["metric"]).combine_chunks()
    now = pa.array([current_metric(name) for name in names.dictionary.to_pylist()], pa.string())
    return table.set_column(table.column_names.index("metric"), "metric", now.take(names.indices))


def _check_values(table: pa.Table) -> None:
    """Raise ValueError for an empty cell where there must be none, or a word or a JSON text that is none."""
    for name, column in COLUMNS.items():
        if not column.optional and table[name].null_count:
            raise ValueError(f"column {name} has empty cells")
    for name, allowed in WORDS.items():
        if strange := set(table[name].unique().to_pylist()) - set(allowed):
            raise ValueError(f"{name} {strange.pop()!r} is none of {allowed}")
    for name in ("settings", "packages"):
        if not all(isinstance(json.loads(text), dict) for text in table[name].unique().to_pylist()):
            raise ValueError(f"column {name} holds no JSON objects")


def _check_finite(path: Path, table: pa.Table) -> None:
    """Raise ValueError, with the run and the metric, for a number that is none."""
    for name in (field.name for field in TYPES if pa.types.is_floating(field.type)):
        bad = table.filter(pc.invert(pc.is_finite(table[name])))  # of missing ones it is not asked
        if bad.num_rows:
            row = {key: bad[key][0].as_py() for key in (name, "metric", "run", "budget")}
            raise ValueError(
                f"{path}: {name} of {row['metric']} of the run {row['run']} after {row['budget']} updates is "
                f"{row[name]}, which is no result: make the run again"
            )
