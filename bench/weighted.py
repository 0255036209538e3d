"""Weighted sums of rewards: `--reward "hps+0.1*aesthetic"`."""

import re

import torch
from pydantic import create_model
from torch import Tensor

from bench.errors import BenchError
from bench.options import Config
from bench.reward import Reward, score

TERM = re.compile(r"([+-]?)(?:(\d+(?:\.\d+)?(?:e-?\d+)?)\*)?([A-Za-z_]\w*)")


def parse(expression: str) -> dict[str, float]:
    """Reward → weight of "a+0.1*b" or "a-2*b". Raises BenchError for anything else."""
    weights: dict[str, float] = {}
    rest = expression
    while rest:
        term = TERM.match(rest)
        if not term or (weights and not term[1]) or term[3] in weights:
            raise BenchError(
                f"cannot read the reward {expression!r} at {rest!r}: write different rewards with numbers before them, "
                'for example "hps+0.1*aesthetic".'
            )
        weights[term[3]] = float(f"{term[1]}{term[2] or 1}")
        rest = rest[term.end() :]
    return weights


def weighted_sum(expression: str, classes: dict[str, type[Reward]]) -> type[Reward]:
    """The class of a weighted sum; each term's options lie under its name (`--set reward.emoji_style.style=noto`).

    classes: the terms' own, by name. `parts` of an instance holds the terms. Raises BenchError for terms of different
    inputs.
    """
    weights = parse(expression)
    if len({own.inputs for own in classes.values()}) > 1:
        kinds = ", ".join(f"{name} scores {own.inputs}" for name, own in classes.items())
        raise BenchError(f"the reward {expression!r} mixes inputs: {kinds}.")
    first = next(iter(classes.values()))
    options = create_model(
        "WeightedSumConfig", __base__=Config, **{name: (own.Config, own.Config()) for name, own in classes.items()}
    )

    class WeightedSum(Reward):
        Config = options
        differentiable = all(own.differentiable for own in classes.values())
        inputs = first.inputs
        scale = f"{expression} of: " + "; ".join(f"{name}: {own.scale}" for name, own in classes.items())
        source = "; ".join(f"{name}: {own.source}" for name, own in classes.items())
        suite = first.suite
        files = tuple(dict.fromkeys(need for own in classes.values() for need in own.files))

        def __init__(self, config: Config, device: torch.device | str = "cpu"):
            super().__init__(config, device)
            self.parts = {name: own(getattr(config, name), device) for name, own in classes.items()}

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return sum(weight * score(self.parts[name], name, images, prompts) for name, weight in weights.items())

    WeightedSum.__doc__ = f"The weighted sum {expression}."
    return WeightedSum
