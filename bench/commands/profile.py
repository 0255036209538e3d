"""`bench profile`: what sampling and one update cost, measured against diffusers' own sampler in the same process."""

import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table

from bench import environment
from bench.commands.run import build_core, build_method
from bench.core import Core
from bench.errors import BenchError
from bench.files import write_atomic
from bench.models import catalogue
from bench.prompts import HUB, load_prompts
from bench.sampling.noise import Noise
from bench.sampling.trajectory import rollout
from bench.settings import RunConfig
from bench.training.meter import COUNTS, Meter
from bench.training.trainer import Trainer
from bench.weights.hub import obtain
from bench.weights.requirements import training_requirements

Row = dict[str, float]  # seconds by phase, counts and peak memory of one call or update


@contextmanager
def random_weights(config: RunConfig, size: str, console: Console) -> Iterator[None]:
    """Inside the block the model's and the reward's weights are random ones, in a hub cache of their own."""
    from bench.weights.random_weights import write

    if catalogue.need(config.model.name) is None:
        raise BenchError(
            f"--random-weights is for models from the hub, and {config.model.name!r} is here: leave it out."
        )
    with tempfile.TemporaryDirectory(prefix="bench-random-") as cache:
        with console.status(f"writing {size} random weights"):
            write(training_requirements(config), Path(cache), size)
        before = os.environ.get("HF_HUB_CACHE")
        os.environ["HF_HUB_CACHE"] = cache
        try:
            yield
        finally:
            os.environ.pop("HF_HUB_CACHE") if before is None else os.environ.update(HF_HUB_CACHE=before)


def profile(config: RunConfig, repeats: int, console: Console, out: Path) -> None:
    """Print and store in `out` what a rollout, diffusers' pipeline call and an update take.

    Analytic models have no pipeline to compare with, only updates.
    """
    obtain(training_requirements(config))
    name = config.prompts.name
    prompts = load_prompts("simple_animals" if name in HUB and HUB[name].missing() else name).train
    core = build_core(config)
    found: dict[str, Any] = {"config": config.model_dump(mode="json"), "environment": environment.describe()}
    if config.model.name not in catalogue.ANALYTIC:
        found["sampling"] = _sampling(core, prompts, repeats)
        _show_sampling(found["sampling"], core, repeats, console)
    found["updates"] = updates = update_rows(core, config, prompts, repeats)
    _show_updates(updates, config, console)
    write_atomic(out, json.dumps(found, indent=1).encode())
    console.print(f"Stored in {out}")


def _sampling(core: Core, prompts: list[str], repeats: int) -> dict[str, list[Row]]:
    """`rollout` and diffusers' pipeline call, in turn, after one uncounted call of each.

    Same network, adapters on, same conditioning, start latents, steps, η and guidance; both end at the latent.
    """
    model, kernel, count = core.model, core.kernel, core.sample_batch
    batch = core.batch([(prompts[i % len(prompts)], i) for i in range(count)])
    noise = Noise(0, "evaluate", batch.samples)
    pipe = model.pipeline
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    null = model.encode([""]).expand_as(batch.conditioning)

    def ours() -> Any:
        with torch.no_grad():
            return rollout(model, kernel, batch, noise)

    def theirs() -> Any:
        return pipe(
            prompt_embeds=batch.conditioning,
            negative_prompt_embeds=null,
            num_inference_steps=kernel.steps,
            guidance_scale=model.guidance,
            eta=kernel.eta,
            latents=noise(0, model.latent_shape).to(model.device, model.network.dtype),
            output_type="latent",
        )

    calls = {"rollout": ours, "diffusers pipeline": theirs}
    for call in calls.values():
        call()
    rounds = [{name: _measure(core.meter, call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [measured[name] for measured in rounds] for name in calls}


def _measure(meter: Meter, call: Callable[[], Any]) -> Row:
    """Seconds, peak memory and rows through the denoiser of one call."""
    own = Meter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = meter.network_forwards
    with own.phase("call"):
        call()
    measured = own.snapshot()
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
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
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
    for (name, own), ratio in zip(measured.items(), (spread, "1"), strict=True):
        median = statistics.median(row["seconds"] for row in own)
        peak, calls = max(row["peak_memory"] for row in own) / 2**30, own[0]["network_forwards"]
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
    console.print(f"an update: {counts}; peak memory {mean['peak_memory'] / 2**30:.2f} GiB", highlight=False)
