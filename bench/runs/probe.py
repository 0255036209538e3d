"""`bench run --dry-run --probe`: what β means for a reward on this prior, from a few of its samples."""

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.evaluation.evaluator import draw, score_samples
from bench.prompts import load_prompts
from bench.runs.build import build_core, evaluation_core, use_threads
from bench.settings import RunConfig

PROMPTS, IMAGES, POINTS = 4, 16, 4096  # prompts, and samples of each
TILTS = (1.0, 5.0, 30.0)  # nats


def spread(rewards: Tensor) -> float:
    """Standard deviation of rewards [prompts, n] within a prompt, pooled."""
    return float(rewards.double().var(1).mean().sqrt())


def effective_size(rewards: Tensor, beta: float) -> float:
    """`(Σw)² / Σw²` of the weights `w = exp(βr)`, rewards [prompts, n]; the mean over prompts, 1 to n."""
    weights = torch.softmax(beta * rewards.double(), 1)
    return float((1 / weights.square().sum(1)).mean())


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
    own_beta, deviation = config.reward.beta, spread(rewards)
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.add_column("β", justify="right")
    table.add_column("tilt, β × spread [nats]", justify="right")
    table.add_column(f"effective samples of {rewards.shape[1]} a prompt", justify="right")
    betas = {} if deviation == 0 else {tilt / deviation: tilt for tilt in TILTS}
    for beta, tilt in sorted((betas | {own_beta: own_beta * deviation}).items()):
        name = f"{beta:.3g} (this run's)" if beta == own_beta else f"{beta:.3g}"
        table.add_row(name, f"{tilt:.3g}", f"{effective_size(rewards, beta):.1f}")
    table.caption = (
        "An image that is one spread better than its prompt's mean becomes exp(tilt) times as likely. With few "
        "effective samples the target lies where the prior hardly draws, and tilt_gap and fid_target are refused."
    )
    return table
