"""Packed runs added to published rows: `bench merge`."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bench import config as configs
from bench.environment import ROOT
from bench.errors import BenchError
from bench.prompts import load_prompts
from bench.publish.compare import compare
from bench.publish.pack import packed_runs
from bench.reporting.identity import canonical, identified
from bench.reporting.rows import FINGERPRINT, RANDOM, read_rows, write_rows
from bench.reporting.selection import MEASURED
from bench.runs.folder import CONTENTS, changed_contents
from bench.runs.rows import comparable_settings, evaluation_id, label
from bench.runtime import yaml_text
from bench.runtime.files import unpack, write_atomic
from bench.settings import RunConfig
from bench.sweeps import choosing, tuned_file

PLACE = ["reward", "beta", "model", "prompts"]


class Merged(NamedTuple):
    """Numbers of runs: added; extended, which were there and gained rows; present, which were there as they are."""

    added: int
    extended: int
    present: int


def merge_packs(packs: Sequence[Path], published: Path) -> Merged:
    """Add the runs of packs to the rows in `published`.

    Raises BenchError with every fault of every run, and every value that contradicts one of the same run that is there
    or in an earlier pack; then nothing is written.
    """
    target, tuned = published / "rows.parquet", published / tuned_file.FILE
    whole = read_rows(target) if target.is_file() else None
    before = choices = yaml_text.parse(tuned.read_text(encoding="utf8")) if tuned.is_file() else None
    faults: list[str] = []
    counts = {"added": 0, "extended": 0, "present": 0}
    with tempfile.TemporaryDirectory() as temporary:
        for number, pack in enumerate(packs):
            place = _opened(pack, Path(temporary, str(number)))
            runs = packed_runs(place)
            if not runs:
                faults.append(f"{pack} holds no packed run.")
            for run in runs:
                try:
                    rows = read_rows(sorted(run.glob("rows*.parquet")))
                    found = compare(rows, whole)
                    run_faults = [*_faults(run, rows), *([] if whole is None else _strange(rows, whole))]
                    run_faults = run_faults or found.conflicts
                except (BenchError, FileNotFoundError, ValueError) as error:
                    run_faults = [str(error)]
                if run_faults:
                    faults += [f"{run.name}: {text}" for text in run_faults]
                    continue
                counts["added" if not found.known else "present" if found.new.empty else "extended"] += 1
                whole = found.new if whole is None else pd.concat([whole, found.new], ignore_index=True)
            new = place / tuned_file.FILE
            if new.is_file():
                try:
                    choices = _joined(choices, yaml_text.parse(new.read_text(encoding="utf8")))
                except (BenchError, KeyError, TypeError, ValueError) as error:
                    faults.append(f"{pack}: {tuned_file.FILE}: {error}")
    if faults:
        raise BenchError("\n".join(["nothing is merged:", *faults]))
    published.mkdir(parents=True, exist_ok=True)
    if whole is not None and counts["added"] + counts["extended"]:
        whole = whole.sort_values(["run", "budget"], kind="stable")
        write_rows(target, whole.astype(object).where(whole.notna(), None).to_dict("records"))
    if choices is not None and choices != before:
        write_atomic(tuned, tuned_file.dump(choices))
    return Merged(**counts)


def _opened(pack: Path, place: Path) -> Path:
    if pack.is_dir():
        return pack
    unpack(pack, place)
    return place


def _faults(run: Path, rows: pd.DataFrame) -> list[str]:
    """What is wrong with a packed run by itself."""
    config = configs.read(run / "config.yaml")
    first, faults = rows.iloc[0], []
    if len(rows[["run", "config_hash", "settings", "evaluation", "seed", "revision"]].drop_duplicates()) > 1:
        faults.append("its rows are of several runs.")
    settings, _ = _settings(first["settings"])
    names = {"method": label(config), "seed": config.seed, "reward": config.reward.name}
    names |= {"beta": config.reward.beta, "model": config.model.name}
    if settings.keys() == _plain(config).keys():  # else of a version whose hash is another
        names |= {"config_hash": config.hash()}
    same = _settings(canonical(json.dumps(_plain(config))))[0] == _settings(canonical(first["settings"]))[0]
    if any(first[key] != value for key, value in names.items()) or not same:
        faults.append("its rows are not those of its config.yaml.")
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
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
    prior = settings.pop(FINGERPRINT, None)
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
    rows, published = identified(rows), identified(published)
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


def _joined(published: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Choices of both; a method's published choice stays. Raises BenchError where they were made by other rules."""
    if published is None:
        return new
    if published["tune"] != new["tune"]:
        raise BenchError(f"tuned otherwise than the published rows, by {new['rule']} over {new['tune']['grid']}")
    have = {tuned_file.key_of(choice["method"], choice["at"]) for choice in published["choices"]}
    added = [choice for choice in new["choices"] if tuned_file.key_of(choice["method"], choice["at"]) not in have]
    choices = [*published["choices"], *added]
    return published | {"cost": choosing.total([choice["cost"] for choice in choices]), "choices": choices}
