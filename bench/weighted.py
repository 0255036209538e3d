"""Weighted sums of rewards: `--reward "hps+0.1*aesthetic"`."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, create_model
from torch import Tensor

from bench import options
from bench.errors import BenchError
from bench.reward import Reward, score

TERM = re.compile(r"([+-]?)(?:(\d+(?:\.\d+)?(?:e-?\d+)?)\*)?([A-Za-z_]\w*)")


def parse(expression: str) -> dict[str, float]:
    """Reward → weight of "a+0.1*b" or "a-2*b". Raises BenchError for anything else."""
    weights: dict[str, float] = {}
    rest = expression
    while rest:
        term = TERM.match(rest)
        weight = float(f"{term[1]}{term[2] or 1}") if term else math.nan
        if not term or (weights and not term[1]) or term[3] in weights or not math.isfinite(weight):
            raise BenchError(
                f"cannot read the reward {expression!r} at {rest!r}: write different rewards with numbers before them, "
                'for example "hps+0.1*aesthetic".'
            )
        weights[term[3]] = weight
        rest = rest[term.end() :]
    return weights


class Combination(options.Config):
    """How the terms come together."""

    combine: Literal["rewards", "advantages", "gdpo"] = Field(
        "rewards",
        description="sum the rewards, or normalise each within a prompt's group and sum the advantages; gdpo: as GDPO",
    )


def weighted_sum(expression: str, classes: dict[str, type[Reward]]) -> type[Reward]:
    """The class of a weighted sum; each term's options lie under its name (`--set reward.emoji_style.style=noto`).

    classes: the terms' own, by name, which are the class's `names`. An instance has them in `parts`, in the order of
    `weights`. Raises BenchError for terms of different inputs.
    """
    weights = parse(expression)
    if len({term.inputs for term in classes.values()}) > 1:
        kinds = ", ".join(f"{name} scores {term.inputs}" for name, term in classes.items())
        raise BenchError(f"the reward {expression!r} mixes inputs: {kinds}.")
    first = next(iter(classes.values()))
    fields: dict[str, Any] = {name: (term.Config, term.Config()) for name, term in classes.items()}
    config_class = create_model("WeightedSumConfig", __base__=Combination, **fields)

    class WeightedSum(Reward):
        Config = config_class
        names = tuple(classes)
        differentiable = all(term.differentiable for term in classes.values())
        inputs = first.inputs
        frames = any(term.frames for term in classes.values())
        scale = f"{expression} of: " + "; ".join(f"{name}: {term.scale}" for name, term in classes.items())
        source = "; ".join(f"{name}: {term.source}" for name, term in classes.items())
        suite = first.suite
        files = tuple(dict.fromkeys(need for term in classes.values() for need in term.files))
        may_miss = any(term.may_miss for term in classes.values())
        columns = tuple(dict.fromkeys(name for term in classes.values() for name in term.columns))

        def __init__(self, config: options.Config, device: torch.device | str = "cpu"):
            super().__init__(config, device)
            self.parts = {name: term(getattr(config, name), device) for name, term in classes.items()}
            self.weights = list(weights.values())

        def set_metadata(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
            super().set_metadata(metadata)
            for part in self.parts.values():
                part.set_metadata(metadata)

        def terms(self, images: Tensor, prompts: list[str]) -> Tensor:
            """The terms' scores [B, R], unweighted."""
            return torch.stack([score(part, name, images, prompts) for name, part in self.parts.items()], 1)

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return self.total(self.terms(images, prompts))

        def total(self, terms: Tensor) -> Tensor:
            """[B, R] → [B]."""
            weighted = [weight * term for weight, term in zip(self.weights, terms.unbind(1), strict=True)]
            return sum(weighted[1:], weighted[0])

    WeightedSum.__doc__ = f"The weighted sum {expression}."
    return WeightedSum
