"""The least KL at every gain of a setting, from samples of its prior: drawn, traced, stored beside the runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.core import Core
from bench.evaluation.evaluator import Evaluator
from bench.hub import project_cache
from bench.models.catalogue import draws_points
from bench.prompts import PromptSet
from bench.reporting.formats import interval
from bench.reporting.frontier import CERTAIN, ENOUGH, EVERY, FILE, Frontier, setting, trace
from bench.reporting.statistics import student
from bench.runs.build import build_core, evaluation_core, use_threads
from bench.runs.preflight import preflight
from bench.runs.rows import comparable_settings, default_folder, prior_settings
from bench.settings import RunConfig

PICTURES, POINTS = 512, 8192  # samples of a prompt


def trace_prior(config: RunConfig, samples: int | None, console: Console) -> Frontier:
    """The curves of a configuration's setting, from so many samples a prompt, `PICTURES` or `POINTS` unless given."""
    prompts = preflight(config)
    use_threads(config)
    return trace_core(evaluation_core(build_core(config), config), config, prompts, samples, console)


def trace_core(
    core: Core, config: RunConfig, prompts: PromptSet, samples: int | None = None, console: Console | None = None
) -> Frontier:
    """The same with the core of the evaluation."""
    points = draws_points(config.model.name)
    count = samples or (POINTS if points else PICTURES)
    if points:  # a network of a few numbers takes them all at once
        core = replace(core, sample_batch=count, micro_batch=count)
    evaluator = Evaluator(core, config, prompts, project_cache())
    splits = dict(zip((prompt for prompt, _ in evaluator.names), evaluator.splits, strict=True))
    rewards: dict[str, list[np.ndarray]] = {}
    with Progress(console=console, disable=console is None) as progress:
        task = progress.add_task(f"{count} prior samples a prompt", total=count * len(splits))
        for prompt, split in splits.items():
            drawn = evaluator.prior_rewards(prompt, count, lambda rows: progress.advance(task, rows))
            rewards.setdefault(split, []).append(drawn.double().numpy())
    of = setting(comparable_settings(config) | prior_settings(config, core.model))
    scored = {split: [one[~np.isnan(one)] for one in own] for split, own in rewards.items()}  # a score may be missing
    least = min(len(one) for own in scored.values() for one in own)
    return trace({split: np.stack([one[:least] for one in own]) for split, own in scored.items()}, of)


def default_file(config: RunConfig) -> Path:
    """Beside the folders of the setting's runs, where reports look for it."""
    return default_folder(config).parent / FILE


def tables(frontier: Frontier, title: str) -> Sequence[Table]:
    """The curve of tilts at a few of its points and the best of n, of all prompts together."""
    tilts = frontier.curve(EVERY)
    last = tilts["gain"].iloc[-1]
    tilted = Table(title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for name in ("gain", "least KL [nats]", "β'", "effective samples"):
        tilted.add_column(name, justify="right")
    for one in tilts.iloc[[len(tilts) * part // 8 for part in range(1, 8)] + [-1]].itertuples():
        reach = np.exp(student(np.inf) * one.kl_error / one.kl) if one.kl else 1.0
        kl = " ".join(interval(one.kl, one.kl / reach, one.kl * reach))
        tilted.add_row(f"{one.gain:.3g}", kl, f"{one.beta:.3g}", f"{one.effective:.0f}")
    tilted.caption = (
        f"From {frontier.samples:,} prior samples a prompt. The curve ends at a gain of {last:.3g}: beyond it a prompt "
        f"has under {ENOUGH} effective samples, or the KL's standard error is over {CERTAIN:.0%}."
    )
    chosen = Table(box=None, pad_edge=False)
    for name in ("best of", "gain", "KL at most [nats]"):
        chosen.add_column(name, justify="right")
    for one in frontier.curve(EVERY, "best_of_n").itertuples():
        reach = student(np.inf) * one.gain_error
        gain = " ".join(interval(one.gain, one.gain - reach, one.gain + reach))
        chosen.add_row(f"{one.n:.0f}", gain, f"{one.kl:.3g}")
    return tilted, chosen
