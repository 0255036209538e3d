"""Runs gathered for others (`bench pack`), and packed runs added to published rows (`bench merge`)."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bench import config as configs
from bench.environment import ROOT
from bench.errors import BenchError
from bench.prompts import load_prompts
from bench.renames import renamed
from bench.reporting.rows import FINGERPRINT, RANDOM, read_rows, write_rows
from bench.reporting.selection import ASIDE, MEASURED
from bench.runs.folder import CONTENTS, changed_contents
from bench.runs.rows import comparable_settings, evaluation_id, label
from bench.runtime.files import write_atomic
from bench.settings import RunConfig
from bench.sweeps import tune as tuning

FILES = ("config.yaml", CONTENTS, "environment.json", "samples.png", "adapter")
ARCHIVES = {".zip": "zip", ".tar.gz": "gztar"}
TOKEN = re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|AKIA)[A-Za-z0-9_\-]{16,}")
ABSOLUTE = re.compile(r"^(?:/|~|[A-Za-z]:[\\/]|file:)")
SAME = ["method", "settings", "seed", "evaluation"]
PLACE = ["reward", "beta", "model", "prompts"]


def pack_runs(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Copy what others need of every run below `folder` that ended into `out`, a folder or an archive.

    A diverged run is a result too. Returns the number of runs, and a sentence for each that is left out. Raises
    BenchError if `out` exists, if no run ended, or if anything would tell of this machine: an absolute path, the home
    folder's name, a token.
    """
    if out.exists():
        raise BenchError(f"{out} exists: choose another --out, or remove it.")
    runs, left_out = [], []
    for run in _runs(folder):
        try:
            read_rows(run / "rows.parquet")
        except (OSError, ValueError):  # none yet, damaged, or of another version
            left_out.append(f"{run} is not finished.")
        else:
            runs.append(run)
    if not runs:
        raise BenchError(f"there is no finished run below {folder}.")
    suffix = next((suffix for suffix in ARCHIVES if out.name.endswith(suffix)), None)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "pack")
        for run in runs:
            target = place / run.name
            target.mkdir(parents=True)
            for path in [*run.glob("rows*.parquet"), *(run / name for name in FILES if (run / name).exists())]:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, target / path.name)
        if (folder / tuning.FILE).is_file():
            shutil.copy(folder / tuning.FILE, place)
        if private := list(_private(place)):
            raise BenchError("\n".join(["nothing is packed, for it would tell of this machine:", *private]))
        out.parent.mkdir(parents=True, exist_ok=True)
        if suffix:
            shutil.make_archive(str(out).removesuffix(suffix), ARCHIVES[suffix], place)
        else:
            shutil.copytree(place, out)
    return len(runs), left_out


def _runs(folder: Path) -> list[Path]:
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
            leaves = list(_strings(yaml.safe_load(data))) if path.suffix in (".yaml", ".json") else []
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


def merge_packs(packs: Sequence[Path], published: Path) -> tuple[int, int]:
    """Add the runs of packs to the rows in `published`; the numbers of those added, and of those that were there.

    Raises BenchError with every fault of every run; then nothing is written.
    """
    target, tuned = published / "rows.parquet", published / tuning.FILE
    present = read_rows(target) if target.is_file() else None
    choices = yaml.safe_load(tuned.read_text(encoding="utf8")) if tuned.is_file() else None
    frames, faults, there = [], [], 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, pack in enumerate(packs):
            place = _opened(pack, Path(temporary, str(number)))
            runs = _runs(place)
            if not runs:
                faults.append(f"{pack} holds no packed run.")
            for run in runs:
                try:
                    rows = read_rows(sorted(run.glob("rows*.parquet")))
                    run_faults = _faults(run, rows)
                    run_faults += [] if present is None or run_faults else _strange(rows, present)
                except (BenchError, FileNotFoundError, ValueError) as error:
                    run_faults = [str(error)]
                faults += [f"{run.name}: {text}" for text in run_faults]
                if not run_faults and _published(rows, present):
                    there += 1
                elif not run_faults:
                    frames.append(rows)
            new = place / tuning.FILE
            if new.is_file():
                try:
                    choices = _joined(choices, yaml.safe_load(new.read_text(encoding="utf8")))
                except (BenchError, KeyError, TypeError, yaml.YAMLError) as error:
                    faults.append(f"{pack}: {tuning.FILE}: {error}")
    if faults:
        raise BenchError("\n".join(["nothing is merged:", *faults]))
    if frames:
        whole = pd.concat([*([] if present is None else [present]), *frames], ignore_index=True)
        whole = whole.drop_duplicates(["run", "metric", "budget"]).sort_values(["run", "budget"], kind="stable")
        published.mkdir(parents=True, exist_ok=True)
        write_rows(target, whole.astype(object).where(whole.notna(), None).to_dict("records"))
        if choices:
            write_atomic(tuned, tuning.dump(choices))
    return len(frames), there


def _opened(pack: Path, place: Path) -> Path:
    if pack.is_dir():
        return pack
    try:
        shutil.unpack_archive(pack, place, filter=None if pack.suffix == ".zip" else "data")
    except (OSError, ValueError, shutil.ReadError) as error:
        raise BenchError(f"{pack} is neither a folder nor an archive of bench pack: {error}") from None
    return place


def _faults(run: Path, rows: pd.DataFrame) -> list[str]:
    """What is wrong with a packed run by itself."""
    config = configs.read(run / "config.yaml")
    first, faults = rows.iloc[0], []
    if len(rows[["run", "config_hash", "settings", "evaluation", "seed", "revision"]].drop_duplicates()) > 1:
        faults.append("its rows are of several runs.")
    names = {"config_hash": config.hash(), "method": label(config), "seed": config.seed, "reward": config.reward.name}
    names |= {"beta": config.reward.beta, "model": config.model.name}
    if any(first[key] != value for key, value in names.items()) or _settings(first["settings"])[0] != _plain(config):
        faults.append("its rows are not those of its config.yaml.")
    prompts = load_prompts(config.prompts.name, config.prompts.limit)
    if first["evaluation"] != evaluation_id(config, prompts):
        faults.append("it was evaluated on other samples than its config.yaml says.")
    if changed := changed_contents(run, config):
        faults.append(f"what {', '.join(changed)} names has other contents here.")
    if not (run / CONTENTS).is_file():
        faults.append(f"it has no {CONTENTS}.")
    if RANDOM in set(rows["status"]):
        faults.append("it was made with random weights.")
    if first["dirty"]:
        faults.append(
            f"the code had changes that revision {first['revision'][:12]} does not have: commit, and run again."
        )
    if not _is_commit(first["revision"]):
        faults.append(f"revision {first['revision'][:12]} is no commit of this repository.")
    return faults


def _settings(text: str) -> tuple[dict[str, Any], str | None]:
    """A row's settings, and its prior's fingerprint."""
    settings = json.loads(text)
    prior = renamed(settings).get(FINGERPRINT)
    settings.pop(FINGERPRINT, None)
    return settings, prior


def _plain(config: RunConfig) -> Any:
    return json.loads(json.dumps(comparable_settings(config)))


def _is_commit(revision: str) -> bool:
    """Whether it is in this checkout's history; without a checkout nobody can say."""
    if not (ROOT / ".git").exists():
        return True
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _strange(rows: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """Why a run cannot stand in a table with the published ones."""
    faults = []
    alike = published[(published[PLACE] == rows[PLACE].iloc[0]).all(axis=1)]
    if len(alike) and rows["evaluation"].iloc[0] not in set(alike["evaluation"]):
        mine, others = (json.loads(frame["settings"].iloc[0]) for frame in (rows, alike))
        keys = [key for key in {**mine, **others} if key.startswith(MEASURED) and mine.get(key) != others.get(key)]
        faults.append(f"it was evaluated on other samples than the published rows ({', '.join(keys) or 'prompts'}).")
    priors = {_settings(text)[1] for text in alike["settings"].unique()}
    if priors and _settings(rows["settings"].iloc[0])[1] not in priors:
        faults.append("its prior has other weights or another precision than that of the published rows.")
    versions = dict(zip(alike["metric"], alike["metric_version"], strict=True))
    other = {m for m, v in zip(rows["metric"], rows["metric_version"], strict=True) if versions.get(m, v) != v}
    if other:
        faults.append(f"other versions of {', '.join(sorted(other))} than the published rows.")
    return faults


def _published(rows: pd.DataFrame, published: pd.DataFrame | None) -> bool:
    """Whether the run is there already, if in the names of another version."""
    if published is None:
        return False
    now = {text: renamed(json.loads(text)) for frame in (rows, published) for text in frame["settings"].unique()}
    ours, theirs = (frame[SAME].assign(settings=frame["settings"].map(now)) for frame in (rows, published))
    return bool((theirs == ours.iloc[0]).all(axis=1).any())


def _joined(published: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Choices of both; a method's published choice stays. Raises BenchError where they were made by other rules."""
    if published is None:
        return new
    if published["tune"] != new["tune"]:
        raise BenchError(f"tuned otherwise than the published rows, by {new['rule']} over {new['tune']['grid']}")
    have = {tuning.key_of(choice["method"], choice["at"]) for choice in published["choices"]}
    added = [choice for choice in new["choices"] if tuning.key_of(choice["method"], choice["at"]) not in have]
    choices = [*published["choices"], *added]
    return published | {"cost": tuning.total([choice["cost"] for choice in choices]), "choices": choices}
