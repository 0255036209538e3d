"""`bench profile`: what sampling and one update cost, measured against diffusers' own sampler in the same process; and
what an update of every method costs, against what its equations need."""

import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import environment
from bench.core import Core
from bench.diagnose.nfe import required_rows
from bench.errors import BenchError
from bench.hub import Requirement, obtain
from bench.models import catalogue
from bench.models.architecture import Size
from bench.models.checks import quiet_libraries
from bench.models.pipeline import PipelineModel
from bench.prompts import HUB, load_prompts
from bench.runs.build import build_core, build_method
from bench.runs.requirements import training_requirements
from bench.runtime.files import write_atomic
from bench.runtime.meter import COUNTS, Meter, reset_peak_memory
from bench.sampling.noise import Noise
from bench.sampling.trajectory import rollout
from bench.settings import RunConfig
from bench.training.trainer import Trainer

Row = dict[str, float]  # seconds by phase, counts and peak memory of one call or update


@contextmanager
def random_weights(config: RunConfig, size: Size, console: Console) -> Iterator[None]:
    """Inside the block the model's and the reward's weights are random ones, in a hub cache of their own."""
    if catalogue.repository(config.model.name) is None:
        raise BenchError(
            f"--random-weights is for models from the hub, and {config.model.name!r} is here: leave it out."
        )
    with stand_ins(training_requirements(config), size, console):
        yield


@contextmanager
def stand_ins(needs: Iterable[Requirement], size: Size, console: Console) -> Iterator[None]:
    """Inside the block random weights stand in for `needs`, in a hub cache that holds nothing else."""
    from bench.models.random_weights import write

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="bench-random-") as cache:
        with console.status(f"writing {size} random weights"):
            write(needs, Path(cache), size)
        with environment.variable("HF_HUB_CACHE", cache):
            yield


def profile(config: RunConfig, repeats: int, console: Console, out: Path) -> None:
    """Print and store in `out` what a rollout, diffusers' pipeline call and an update take.

    Analytic models have no pipeline to compare with, only updates.
    """
    obtain(training_requirements(config))
    prompts, core = profile_prompts(config), build_core(config)
    report: dict[str, Any] = {"config": config.model_dump(mode="json"), "environment": environment.describe()}
    if not catalogue.is_analytic(config.model.name):
        report["sampling"] = sampling_rows(core, prompts, repeats)
        _show_sampling(report["sampling"], core, repeats, console)
    report["updates"] = updates = update_rows(core, config, prompts, repeats)
    _show_updates(updates, config, console)
    write_atomic(out, json.dumps(report, indent=1).encode())
    console.print(f"Stored in {out}")


def profile_prompts(config: RunConfig) -> list[str]:
    """The training prompts; those that ship where the configured ones would have to be downloaded."""
    name = config.prompts.name
    return load_prompts("simple_animals" if name in HUB and HUB[name].missing() else name).train


def sampling_rows(core: Core, prompts: list[str], repeats: int) -> dict[str, list[Row]]:
    """`rollout` and diffusers' pipeline call, in turn, after one uncounted call of each.

    Same network, adapters on, same conditioning, start latents, steps, guidance and, but for a flow's pipeline, which
    has none, η; both end at the latent.
    """
    model, kernel, count = core.model, core.kernel, core.sample_batch
    assert isinstance(model, PipelineModel)
    batch = core.batch([(prompts[i % len(prompts)], i) for i in range(count)])
    noise = Noise(0, "evaluate", batch.samples)

    def ours() -> Any:
        with torch.no_grad():
            return rollout(model, kernel, batch, noise)

    def theirs() -> Any:
        z = noise(0, model.latent_shape)
        return model.call_pipeline(model.pipeline, batch.conditioning, z, kernel, "latent")

    calls = {"rollout": ours, "diffusers pipeline": theirs}
    for call in calls.values():
        call()
    rounds = [{name: _measure(core.meter, call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [measured[name] for measured in rounds] for name in calls}


def _measure(meter: Meter, call: Callable[[], Any]) -> Row:
    """Seconds, peak memory and NFE of one call."""
    call_meter = Meter()
    reset_peak_memory()
    before = meter.network_forwards
    with call_meter.phase("call"):
        call()
    measured = call_meter.snapshot()
    return {
        "seconds": measured["seconds"]["call"],
        "peak_memory": measured["peak_memory"],
        "network_forwards": meter.network_forwards - before,
    }


def update_rows(core: Core, config: RunConfig, prompts: list[str], rounds: int) -> list[Row]:
    """Seconds by phase, counts and peak memory so far of each update of `rounds` rounds, after one uncounted round."""
    per_round = config.train.updates_per_round
    train = config.train.model_copy(update={"updates": per_round * (rounds + 1), "checkpoint_every": 10**6})
    seen: list[dict[str, float]] = []
    reset_peak_memory()
    core.meter.peak_memory = 0
    with tempfile.TemporaryDirectory() as folder:
        Trainer(core, build_method(config), prompts, train, config.optimizer, Path(folder)).run(seen.append)
    added = [name for name in seen[-1] if name in COUNTS or (name.startswith("seconds/") and "checkpoint" not in name)]
    rows = [
        {name: after[name] - before.get(name, 0.0) for name in added} | {"peak_memory": after["peak_memory"]}
        for before, after in itertools.pairwise(seen)
    ]
    return rows[per_round - 1 :]


def _show_sampling(measured: dict[str, list[Row]], core: Core, repeats: int, console: Console) -> None:
    ours, theirs = ([row["seconds"] for row in rows] for rows in measured.values())
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
    rows = core.sample_batch
    table = Table(title=f"sampling {rows} latents, {core.kernel.steps} steps; median of {repeats} pairs")
    for heading in ("sampler", "seconds", "seconds per latent", "ratio to diffusers (min–max)", "rows", "peak GiB"):
        table.add_column(heading)
    for (name, repeats_of), ratio in zip(measured.items(), (spread, "1"), strict=True):
        median = statistics.median(row["seconds"] for row in repeats_of)
        peak, calls = max(row["peak_memory"] for row in repeats_of) / 2**30, repeats_of[0]["network_forwards"]
        table.add_row(name, f"{median:.3f}", f"{median / rows:.4f}", ratio, f"{calls:,.0f}", f"{peak:.2f}")
    console.print(table)


def _show_updates(updates: list[Row], config: RunConfig, console: Console) -> None:
    mean = {name: statistics.mean(row[name] for row in updates) for name in updates[0]}
    seconds = {name.removeprefix("seconds/"): value for name, value in mean.items() if name.startswith("seconds/")}
    total = sum(seconds.values())
    table = Table(title=f"{config.method.name}: mean of {len(updates)} updates after the first round")
    for heading in ("phase", "seconds", "share"):
        table.add_column(heading)
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.3f}", f"{value / total:.0%}")
    table.add_row("all", f"{total:.3f}", "")
    console.print(table)
    counts = ", ".join(f"{mean[name]:,.0f} {name.replace('_', ' ')}" for name in COUNTS)
    console.print(f"an update: {counts}; peak memory {mean['peak_memory'] / 2**30:.2f} GiB")


# Every method --------------------------------------------------------------------------------------------------------


class PhaseMeter(Meter):
    """A meter that also keeps its counts by phase: `counts[phase, name]`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See `Meter.phase`."""
        before = {count: getattr(self, count) for count in COUNTS}
        with super().phase(name):
            yield
        self.counts.update({(name, count): getattr(self, count) - before[count] for count in COUNTS})


def profile_all(configs: Sequence[RunConfig], console: Console, out: Path) -> None:
    """Print and store in `out` what an update of every configuration's method takes, beside what it needs."""
    obtain(training_requirements(configs[0]))
    prompts = profile_prompts(configs[0])
    report: dict[str, Any] = {"environment": environment.describe(), "configs": {}, "updates": {}}
    for config in track(configs, "profiling", console=console, transient=True):
        name = config.method.name
        report["configs"][name] = config.model_dump(mode="json")
        report["updates"][name] = method_costs(config, prompts)
        write_atomic(out, json.dumps(report, indent=1).encode())
    _show_all(report["updates"], configs[0], console)
    console.print(f"Stored in {out}")


def method_costs(config: RunConfig, prompts: list[str]) -> dict[str, Any]:
    """Means over one round's updates, after one uncounted round: rows by part, reward calls, seconds, peak memory.

    required: see `bench.diagnose.nfe`, None for a method that does not say. seconds: of the processor, all
    threads together, which other jobs do not lengthen; with a GPU those that it took.
    """
    core, method, updates = build_core(config), build_method(config), config.train.updates_per_round
    meter = PhaseMeter()
    core = replace(core, meter=meter)
    meter.watch(core.model.network)
    marks: list[tuple[float, float, Counter]] = []

    def on_update(record: dict[str, Any]) -> None:
        marks.append((sum(meter.seconds.values()), time.process_time(), Counter(meter.counts)))
        if len(marks) == updates:
            reset_peak_memory()
            meter.peak_memory = 0

    train = config.train.model_copy(update={"updates": 2 * updates, "checkpoint_every": 10**6, "data_lag": 0})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(core, method, prompts, train, config.optimizer, Path(folder))
        trainer.run(on_update)
    before, after = marks[updates - 1], marks[-1]
    counts = {key: (value - before[2][key]) / updates for key, value in after[2].items()}
    needed = required_rows(core, method, core.batch(trainer.names(1)))
    gpu = core.model.device.type == "cuda"
    return {
        "rollout": counts.get(("rollout", "network_forwards"), 0),
        "forward": sum(counts.get((phase, "network_forwards"), 0) for phase in ("losses", "backward")),
        "backward": sum(counts.get((phase, "network_backwards"), 0) for phase in ("losses", "backward")),
        "required": None if needed is None else {name: value / updates for name, value in asdict(needed).items()},
        "reward_calls": sum(value for (_, name), value in counts.items() if name == "reward_calls"),
        "reward_gradients": sum(value for (_, name), value in counts.items() if name == "reward_gradients"),
        "clock": "device" if gpu else "processor",
        "seconds": (after[0] - before[0] if gpu else after[1] - before[1]) / updates,
        "peak_memory": meter.snapshot()["peak_memory"],
    }


def _show_all(costs: dict[str, dict[str, Any]], config: RunConfig, console: Console) -> None:
    train, sampler = config.train, config.sampler
    count = train.prompts_per_round * train.samples_per_prompt // train.updates_per_round
    table = Table(
        title=f"an update of {count} trajectories of {sampler.steps} steps, guidance {sampler.guidance:g}, on "
        f"{config.model.name}: NFE, measured / required (ratio)"
    )
    clock = next(iter(costs.values()))["clock"]
    headings = ("rollout", "losses forward", "losses backward", "reward calls", "gradients")
    for heading in ("method", *headings, f"{clock} seconds", "peak GiB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, cost in costs.items():
        rows = [_beside(cost[part], (cost["required"] or {}).get(part)) for part in ("rollout", "forward", "backward")]
        calls = [f"{cost[part]:,.0f}" for part in ("reward_calls", "reward_gradients")]
        table.add_row(name, *rows, *calls, f"{cost['seconds']:.2f}", f"{cost['peak_memory'] / 2**30:.2f}")
    console.print(table)


def _beside(measured: float, needed: float | None) -> str:
    if needed is None:
        return f"{measured:,.0f} / ?"
    return f"{measured:,.0f} / {needed:,.0f}" + (f" ({measured / needed:.2f})" if needed else "")
