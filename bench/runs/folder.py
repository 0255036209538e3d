"""A run's folder: who may write to it, what its run began with, and which earlier run a new one continues."""

import contextlib
import itertools
import json
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import config as configs
from bench import registry
from bench.errors import BenchError
from bench.prompts import load_prompts
from bench.reporting.rows import read_rows
from bench.runs.build import build_method
from bench.runs.contents import contents
from bench.runtime.files import LOCK, leftovers, locked, write_atomic
from bench.settings import RunConfig
from bench.training import checkpoint

CONTENTS = "contents.json"


def take_folder(folder: Path, config: RunConfig, console: Console, force: bool, locks: contextlib.ExitStack) -> bool:
    """Lock the folder and prepare it for this run; True if the run is already finished there.

    Of several processes the main one alone does this. locks: holds the lock until the run ends. An interrupted run goes
    on with this configuration's settings of `EXECUTION`. A folder with the run of another configuration, or with one
    begun with other contents behind the same names, is refused; with `force` it is moved aside, not deleted. Raises
    BenchError also if another process holds the lock.
    """
    stored = folder / "config.yaml"
    present = set(folder.iterdir()) if folder.is_dir() else set()
    before_config = {folder / LOCK, folder / CONTENTS, *leftovers(folder)}  # what a run writes before config.yaml
    if present - before_config and not stored.is_file():
        raise BenchError(f"{folder} is not empty and holds no run: choose another --out.")
    locks.enter_context(locked(folder))
    if stored.is_file():
        try:
            earlier = configs.read(stored)
        except (BenchError, KeyError, TypeError):  # of another version, or with a plugin that is not installed
            earlier = None
        if earlier and earlier.hash() == config.hash() and not force:
            require_contents(folder, config)
            if is_finished(folder):
                return True
            _go_on(folder, config, earlier, console)
            return False
        if not force:
            raise BenchError(
                f"{folder} holds a run of another configuration (see {stored}): choose another --out, or give "
                "--force to move it aside."
            )
        names = (folder.with_name(f"{folder.name}.old{i}") for i in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        folder.rename(aside)
        locks.enter_context(locked(folder))
        console.print(f"Moved the earlier run to {aside}.")
    _store(folder, config)
    if not force and registry.load("methods", config.method.name).needs.training:
        _extend(folder, config, console)
    return False


def _extend(folder: Path, config: RunConfig, console: Console) -> None:
    """Begin where a neighbouring run of the same settings with fewer updates ended, if this run would get there."""
    for neighbour in sorted(folder.parent.glob(f"{config.method.name}-seed{config.seed}-*")):
        try:
            earlier = configs.read(neighbour / "config.yaml")
        except (BenchError, OSError):
            continue
        done, train = earlier.train.updates, config.train
        same = earlier.model_copy(update={"train": earlier.train.model_copy(update={"updates": train.updates})})
        if done >= train.updates or same.hash() != config.hash() or changed_contents(neighbour, config):
            continue
        state = checkpoint.load(neighbour / "checkpoints")
        why = _unlike(config, state)
        if why or state is None:
            console.print(f"{neighbour} has {done} updates of the same settings, but {why}: starting anew.")
            continue
        path = checkpoint.newest(neighbour / "checkpoints")
        checkpoint.save(folder / "checkpoints", state["update"], state)
        if (neighbour / "log.jsonl").is_file():
            write_atomic(folder / "log.jsonl", (neighbour / "log.jsonl").read_bytes())
        console.print(f"Going on from {path}, of a run of the same settings with {done} updates.")
        return


def _unlike(config: RunConfig, state: dict[str, Any] | None) -> str | None:
    """Why a run with this configuration would not have come by the state of a shorter one, or None."""
    copies = build_method(config).copies().values()
    shares = {
        "train.beta_warmup": config.train.beta_warmup,
        "optimizer.decay": config.optimizer.decay,
        "a stage of the method": any(copy.stages and not copy.rounds for copy in copies),
    }
    if why := next((f"{key} is a share of all updates" for key, share in shares.items() if share), None):
        return why
    if state is None or state["update"] % config.train.updates_per_round:
        return "it has no checkpoint at the end of a round"
    missed = [update for update in config.evaluated_at() if update < state["update"]]
    return f"this run is also evaluated after {missed[0]}" if missed else None


def _go_on(folder: Path, config: RunConfig, earlier: RunConfig, console: Console) -> None:
    """Store this configuration, which differs from the earlier one in settings of `EXECUTION` alone; say in which."""
    before = earlier.execution()
    if changes := {key: new for key, new in config.execution().items() if new != before[key]}:
        text = ", ".join(f"{key} = {json.dumps(new)} (was {json.dumps(before[key])})" for key, new in changes.items())
        console.print(f"The run goes on with {text}: results agree to rounding.")
        _store(folder, config)


def _store(folder: Path, config: RunConfig) -> None:
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    write_atomic(folder / CONTENTS, json.dumps(contents(config, prompts), indent=2).encode())
    write_atomic(folder / "config.yaml", config.to_yaml().encode())


def is_finished(folder: Path) -> bool:
    """Whether the run in the folder has its final rows, whole and of this version."""
    path = folder / "rows.parquet"
    try:
        return path.is_file() and "failed" not in set(read_rows(path)["status"])
    except (ValueError, OSError):
        return False


def require_contents(folder: Path, config: RunConfig) -> None:
    """Raise BenchError if a name in the configuration no longer stands for what the run in the folder began with."""
    if changed := changed_contents(folder, config):
        values = ", ".join(f"{key} = {attrgetter(key)(config)}" for key in changed)
        raise BenchError(
            f"the run in {folder} was begun with other contents of {values}: put them back, choose another --out, or "
            "give --force to begin anew."
        )


def changed_contents(folder: Path, config: RunConfig) -> list[str]:
    """Settings whose names stand for other contents than when the run in the folder began."""
    try:
        before = json.loads((folder / CONTENTS).read_text(encoding="utf8"))
        now = contents(config, load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split))
        return [key for key, digest in now.items() if before.get(key, digest) != digest]
    except FileNotFoundError:  # of an earlier version, which stored none
        return []
    except (ValueError, AttributeError) as error:
        raise BenchError(
            f"{folder / CONTENTS} is damaged ({error}): put it back, or remove it, and what names stand for is not "
            "compared."
        ) from None


class traceback_log:
    """Write the traceback of an error in the block to the run's folder."""

    def __init__(self, folder: Path):
        rank = os.environ.get("RANK", "0")
        self.path = folder / ("error.log" if rank == "0" else f"error-{rank}.log")  # of several processes, each its own

    def __enter__(self) -> None:
        self.path.unlink(missing_ok=True)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            import traceback as formatting

            with contextlib.suppress(OSError):  # the disk may be what failed
                self.path.parent.mkdir(parents=True, exist_ok=True)  # on another machine than the main process's
                self.path.write_text("".join(formatting.format_exception(error)), encoding="utf8")
