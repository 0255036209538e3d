"""`bench profile`: what sampling and one update cost, measured against diffusers' own sampler in the same process."""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table

from bench.config import RunConfig
from bench.core import Core
from bench.meter import Meter
from bench.noise import Noise
from bench.prompts import PromptSet
from bench.run import build_core, build_method
from bench.trainer import Trainer
from bench.trajectory import rollout


def profile(config: RunConfig, prompts: PromptSet, repeats: int, console: Console) -> None:
    """Print seconds of a rollout beside diffusers' pipeline call, then seconds of an update by phase."""
    core = build_core(config)
    ours, theirs = sampling_seconds(core, prompts.train, repeats)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    rows = core.sample_batch
    table = Table(title=f"sampling {rows} latents, {core.kernel.steps} steps, guided; median of {repeats} pairs")
    for heading in ("sampler", "seconds", "seconds per latent", "ratio to diffusers (min–max)"):
        table.add_column(heading)
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
    for name, seconds, ratio in (("rollout", ours, spread), ("diffusers pipeline", theirs, "1")):
        median = statistics.median(seconds)
        table.add_row(name, f"{median:.3f}", f"{median / rows:.4f}", ratio)
    console.print(table)

    records = update_records(core, config, prompts.train, repeats)
    table = Table(title=f"{config.method.name}: mean of {len(records)} updates after the first round")
    for heading in ("phase", "seconds", "share"):
        table.add_column(heading)
    phases = {name: statistics.mean(record[name] for record in records) for name in records[0]}
    total = sum(phases.values())
    for name, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds:.3f}", f"{seconds / total:.0%}")
    table.add_row("all", f"{total:.3f}", "")
    console.print(table)
    console.print(f"peak memory {core.meter.snapshot()['peak_memory'] / 2**30:.2f} GiB")


def sampling_seconds(core: Core, prompts: list[str], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of `rollout` and of diffusers' pipeline call, in turn, after one uncounted call of each.

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
            latents=noise(0, model.latent_shape).to(model.device),
            output_type="latent",
        )

    _seconds(ours), _seconds(theirs)
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _seconds(call: Callable[[], Any]) -> float:
    meter = Meter()
    with meter.phase("call"):
        call()
    return meter.seconds["call"]


def update_records(core: Core, config: RunConfig, prompts: list[str], rounds: int) -> list[dict[str, float]]:
    """Seconds by phase of each update of `rounds` rounds, after one uncounted round."""
    per_round = config.train.updates_per_round
    train = config.train.model_copy(update={"updates": per_round * (rounds + 1), "checkpoint_every": 10**6})
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(core, build_method(config), prompts, train, config.optimizer, Path(folder))
        trainer.run(lambda record: seen.append({k: v for k, v in record.items() if k.startswith("seconds/")}))
    names = [name for name in seen[-1] if name != "seconds/checkpoint"]
    steps = [
        {name.removeprefix("seconds/"): after[name] - before.get(name, 0.0) for name in names}
        for before, after in itertools.pairwise(seen)
    ]
    return steps[per_round - 1 :]
