"""Evaluate the adapter of a finished run again."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import Tensor

from bench import config as configs
from bench.core import Core
from bench.errors import BenchError
from bench.evaluation.alarms import Alarms
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.pictures import draw_samples
from bench.hub import project_cache
from bench.metric import Evaluation, Measurement
from bench.model import DiffusionModel
from bench.models.elsewhere.weights import install, load_adapter
from bench.prompts import load_prompts
from bench.reporting.rows import read_rows, write_rows
from bench.reporting.table import run_table
from bench.runs.adapter import load_networks
from bench.runs.build import build_core, build_method, evaluation_core, use_threads
from bench.runs.folder import require_contents
from bench.runs.out_of_memory import explain_out_of_memory
from bench.runs.progress import evaluate
from bench.runs.rows import prior_settings, provenance, row
from bench.runtime import memory
from bench.runtime.meter import COUNTS
from bench.settings import EXECUTION, JUDGED, RunConfig
from bench.training import checkpoint


def execution_of(folder: Path) -> tuple[str, ...]:
    """Keys of the settings that say how a run is computed, its reward's among them if it has a configuration."""
    path = folder / "config.yaml"
    return tuple(configs.read(path).execution()) if path.is_file() else EXECUTION


def evaluate_again(folder: Path, assignments: list[str], console: Console) -> Path:
    """Evaluate a finished run with other evaluation settings; returns the folder of the new rows and picture.

    Raises BenchError if `folder` holds no finished run, or if an assignment changes more than the evaluation and how
    it is computed.
    """
    keys = execution_of(folder)
    if others := [text for text in assignments if not text.startswith(("evaluation.", *keys))]:
        raise BenchError(
            f"--set {others[0]} would change the run itself: bench eval takes evaluation.* settings only, and "
            f"{', '.join(keys)}."
        )
    stored = evaluate_stored(folder, assignments, console)
    config = configs.read(folder / "config.yaml", assignments)
    out = folder / f"eval-{config.hash()[:8]}"
    out.mkdir(exist_ok=True)
    write_rows(out / "rows.parquet", stored.rows)
    title = f"{config.method.name} on {config.reward.name} ({config.model.name})"
    draw_samples(stored.evaluation, stored.measurements, stored.core, out, title)
    console.print(run_table(read_rows(out / "rows.parquet")))
    return out


class Stored(NamedTuple):
    """A stored run, evaluated: its samples, what was measured on them, and the rows.

    counted: whether the rows' counts come from the training; a packed run has no others than those of its rows.
    """

    core: Core
    evaluation: Evaluation
    measurements: list[Measurement]
    rows: list[dict[str, Any]]
    counted: bool


def evaluate_stored(folder: Path, assignments: list[str], console: Console) -> Stored:
    """Evaluate the adapter in the folder of a run.

    Raises BenchError if it holds no finished run, or one begun with other contents behind the same names.
    """
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise BenchError(f"{folder} holds no run: it has no config.yaml.")
    config = configs.read(stored, assignments)
    require_contents(folder, config)
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    use_threads(config)
    method = build_method(config)
    with explain_out_of_memory(config, folder):
        with memory.phase("loading"):
            core = build_core(config)
            if config.method.name == JUDGED:
                install(core.model, folder / "adapter", config)
            updates, counted = _load_trained(core, config, folder) if method.needs.training else (0, True)
            if not method.needs.adapters:
                load_networks(method, core, folder / "adapter")
            evaluator = Evaluator(evaluation_core(core, config), config, prompts, project_cache(), method)
        evaluation, measurements = evaluate(evaluator, console)
    info = provenance(config) | {"prior": prior_settings(config, evaluator.core.model)}
    counts = core.meter.total()
    noted = Alarms(config.reward.beta).noted(measurements, evaluation.finetuned.step_kl)
    rows = [row(config, prompts, counts, info, measurement, updates) for measurement in noted]
    return Stored(core, evaluation, measurements, rows, counted)


def _load_trained(core: Core, config: RunConfig, folder: Path) -> tuple[int, bool]:
    """Load the adapter, the copies and the counts of the finished run in `folder`.

    Returns the updates that it made, and whether the counts come from its training: a packed run has those of its rows,
    and of the copies the one that was evaluated. Raises BenchError for another run.
    """
    packed = (folder / "rows.parquet").is_file() and not (folder / "checkpoints").is_dir()
    state: dict[str, Any] | None
    if packed:
        last = read_rows(folder / "rows.parquet").iloc[-1]
        counts = {name: int(last[name]) for name in COUNTS} | {"seconds": {"training": float(last["train_seconds"])}}
        state = {"update": int(last["updates"]), "meter": counts}
    else:
        state = checkpoint.load(folder / "checkpoints")
    ended = state is not None and (packed or state.get("ended_at_kl") is not None)
    if state is None or not (ended or state["update"] >= config.train.updates) or not (folder / "adapter").is_dir():
        raise BenchError(f"the run in {folder} is not finished: resume it first with the command that began it.")
    try:
        copies = _packed_copies(core.model, folder) if packed else state["copies"]
        for name, stored in copies.items():
            core.copies[name] = {key: value.to(core.model.device) for key, value in stored.items()}
        core.meter.restore(state["meter"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchError(f"the checkpoint in {folder} is damaged or of another version: {error}.") from error
    load_adapter(core.model, folder / "adapter")  # after the copies, which stood in the model for a moment
    if (name := config.evaluation.weights) not in ("policy", *core.copies):
        available = ", ".join(["policy", *core.copies])
        raise BenchError(f"evaluation.weights = {name!r}: the run in {folder} has {available}.")
    return state["update"], not packed


def _packed_copies(model: DiffusionModel, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Name → parameters of the copies of the adapters in `folder`; they stand in the model for a moment."""
    copies = {}
    for path in sorted(folder.glob("adapter-*")):
        load_adapter(model, path)
        copies[path.name.removeprefix("adapter-")] = {k: p.detach().clone() for k, p in model.adapters().items()}
    return copies
