"""Runs gathered for others: `bench pack`."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from bench.environment import ROOT
from bench.errors import BenchError
from bench.publish.compare import compare
from bench.reporting.rows import read_rows
from bench.reporting.selection import ASIDE
from bench.runs.folder import CONTENTS
from bench.runtime import yaml_text
from bench.sweeps import tuned_file

FILES = ("config.yaml", CONTENTS, "environment.json", "samples.png")
ARCHIVES = {".zip": "zip", ".tar.gz": "gztar"}
TOKEN = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|AKIA)[A-Za-z0-9_\-]{16,}")
ABSOLUTE = re.compile(r"^(?:/|~|[A-Za-z]:[\\/]|file:)")


def pack_runs(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Copy what others need of every run below `folder` that ended into `out`, a folder or an archive.

    That is what `verify`, `eval`, `sample` and `push` read. A diverged run is a result too. Returns the number of runs,
    and a sentence for each that is left out. Raises BenchError if `out` exists, if no run ended, if two folders hold
    one run with different values, or if anything would tell of this machine: an absolute path, the home folder's name,
    a token.
    """
    if out.exists():
        raise BenchError(f"{out} exists: choose another --out, or remove it.")
    runs, left_out = _finished(folder)
    suffix = next((suffix for suffix in ARCHIVES if out.name.endswith(suffix)), None)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "pack")
        for run in runs:
            target = place / (run.resolve().name if run == folder else run.relative_to(folder))
            target.mkdir(parents=True)
            files = [run / name for name in FILES if (run / name).exists()]
            for path in [*run.glob("rows*.parquet"), *files]:
                shutil.copy(path, target)
            for path in run.glob("adapter*"):  # the policy, and the copy that was evaluated
                shutil.copytree(path, target / path.name)
        if (folder / tuned_file.FILE).is_file():
            shutil.copy(folder / tuned_file.FILE, place)
        if private := list(_private(place)):
            raise BenchError("\n".join(["nothing is packed, for it would tell of this machine:", *private]))
        out.parent.mkdir(parents=True, exist_ok=True)
        if suffix:
            shutil.make_archive(str(out).removesuffix(suffix), ARCHIVES[suffix], place)
        else:
            shutil.copytree(place, out)
    return len(runs), left_out


def _finished(folder: Path) -> tuple[list[Path], list[str]]:
    """The run folders below that ended, every run once, and a sentence for each of the others.

    Raises BenchError if there is none, or if two of them hold one run with different values.
    """
    runs: list[Path] = []
    left_out, faults, known = [], [], None
    for run in packed_runs(folder):
        try:
            rows = read_rows(sorted(run.glob("rows*.parquet")))
            read_rows(run / "rows.parquet")
        except (OSError, ValueError):  # none yet, damaged, or of another version
            left_out.append(f"{run} is not finished.")
            continue
        found = compare(rows, known)
        faults += [f"{run}: {text}" for text in found.conflicts]
        if found.new.empty:
            left_out.append(f"{run} holds a run that another folder holds too.")
        else:
            runs.append(run)
            known = pd.concat([known, found.new], ignore_index=True)
    if faults:
        raise BenchError("\n".join(["nothing is packed:", *faults]))
    if not runs:
        raise BenchError(f"there is no finished run below {folder}.")
    return runs, left_out


def packed_runs(folder: Path) -> list[Path]:
    """Run folders, not those moved aside, nor a sweep's trials, nor adapters in them."""
    folders = sorted(path.parent for path in folder.rglob("config.yaml"))
    runs = [run for run in folders if not (run.parent / "config.yaml").is_file()]  # an adapter carries its run's
    return [run for run in runs if not any(ASIDE.search(part) for part in run.relative_to(folder).parts)]


def _private(place: Path) -> Iterator[str]:
    """A sentence for every file below that holds an absolute path, this machine's folders or a token."""
    named = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    secrets = {value for name, value in os.environ.items() if name.endswith(named) and len(value) > 7}
    folders = {str(path) for path in (Path.home(), Path.cwd(), ROOT) if len(path.parts) > 1}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        data, name = path.read_bytes(), path.relative_to(place)
        texts: list[str] = []
        if path.suffix == ".parquet":
            frame = read_rows(path)
            texts = [
                text for column in frame.select_dtypes(["object", "string"]) for text in frame[column].dropna().unique()
            ]
            leaves = [*texts, *(leaf for text in frame["settings"].unique() for leaf in _strings(json.loads(text)))]
        else:
            texts = [data.decode("utf8", "replace")]
            try:
                leaves = list(_strings(yaml_text.parse(texts[0]))) if path.suffix in (".yaml", ".json") else []
            except ValueError as error:
                raise BenchError(f"{name} is damaged ({error}): run its command again.") from None
        if any(TOKEN.search(text) or any(secret in text for secret in secrets) for text in map(str, texts)):
            yield f"{name} holds a token."
        paths = {leaf for leaf in map(str, leaves) if ABSOLUTE.match(leaf)}
        paths |= {folder for folder in folders if any(folder in str(text) for text in texts)}
        if paths:
            yield f"{name} names {', '.join(sorted(paths))}: others cannot have it; use a hub id or a name of bench ls."


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(part)
