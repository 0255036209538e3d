"""`bench run --dry-run --probe`: what β means for a reward on this prior, from a few of its samples."""

import math

from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.evaluation.draw import draw
from bench.evaluation.scores import score_samples
from bench.prompts import load_prompts
from bench.reporting.frontier import tilt, tilt_of
from bench.runs.build import build_core, evaluation_core, use_threads
from bench.settings import RunConfig

PROMPTS, IMAGES, POINTS = 4, 16, 4096  # prompts, and samples of each
TILTS = (0.1, 0.5, 1.0, 2.0)  # nats
FEW = 5  # effective samples of a prompt, below which its KL is larger than they show


def spread(rewards: Tensor) -> float:
    """Standard deviation of rewards [prompts, n] within a prompt, pooled."""
    return float(rewards.double().var(1).mean().sqrt())


def show_probe(config: RunConfig, console: Console) -> None:
    """Draw prior samples of a few training prompts, score them, and print what β makes of their differences."""
    use_threads(config)
    core = build_core(config)
    points = core.reward_model.inputs == "points"
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split).train[:PROMPTS]
    each = POINTS if points else IMAGES
    names = [(prompt, index) for prompt in prompts for index in range(each)]
    kernel = evaluation_core(core, config)
    with console.status(f"drawing {len(names)} samples of the prior"):
        samples = draw(kernel, names, ["train"] * len(names), seed=config.seed, purpose="reference", prior=True)
        samples = score_samples(samples, {core.reward_name: core.reward_model}, core.micro_batch, "the prior's own")
    rewards = samples.rewards[core.reward_name].view(len(prompts), each)
    console.print(_summary(config, rewards))
    console.print(_table(config, rewards))


def _summary(config: RunConfig, rewards: Tensor) -> str:
    count, each = rewards.shape
    return (
        f"probe: the mean of {config.reward.name} is {rewards.mean():.4g} on {count * each} prior samples (prompts: "
        f"{count}, of each {each}); within a prompt it spreads by {spread(rewards):.3g} (standard deviation)."
    )


def _table(config: RunConfig, rewards: Tensor) -> Table:
    drawn, own_beta = rewards.double().numpy(), config.reward.beta
    table = Table(box=None, pad_edge=False, caption_justify="left")
    for name in ("β", "KL of the target [nats]", "its gain", f"effective samples of {rewards.shape[1]}, fewest"):
        table.add_column(name, justify="right")
    found = {} if spread(rewards) == 0 else {tilt_of(drawn, nats): nats for nats in TILTS}
    for beta in sorted({beta for beta in found if math.isfinite(beta)} | {own_beta}):
        point = tilt(drawn, beta)
        bound = "≥ " if point["effective"] < FEW else ""
        name = f"{beta:.3g} (this run's)" if beta == own_beta else f"{beta:.3g}"
        table.add_row(name, f"{bound}{point['kl']:.3g}", f"{bound}{point['gain']:.3g}", f"{point['effective']:.1f}")
    table.caption = (
        "The target is the prior times exp(β × reward); KL and gain are means over prompts. With few effective samples "
        "it lies where the prior hardly draws, and tilt_gap and fid_target are refused. bench frontier has the curve."
    )
    return table
