"""Advantages of policy-gradient methods."""

import itertools
from collections import deque
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.core import Core
from bench.options import Config
from bench.sampling.trajectory import Trajectory


class Deviation(Config):
    """What a centred reward is divided by; published codes differ in all three."""

    over: Literal["group", "round"] = Field("group", description="the prompt's samples, or all of the round")
    correction: Literal[0, 1] = Field(0, description="0: of the population, 1: unbiased")
    epsilon: float = Field(1e-6, ge=0, description="added to it")


class PromptStatistics:
    """Rewards normalised per prompt over a running buffer (Black et al., 2024, DDPO).

    A prompt's last `buffer` rewards give its mean and deviation; while it has fewer than `minimum`, the statistics of
    the whole batch stand in.
    """

    def __init__(self, buffer: int, minimum: int):
        self.buffer, self.minimum = buffer, minimum
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """[B] rewards → [B] advantages, after adding the rewards to the buffers."""
        values = rewards.tolist()  # on the host, as the buffers are
        for prompt, reward in zip(prompts, values, strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        whole = torch.tensor(values)
        batch = whole.mean(), whole.std(correction=0)
        known = {}
        for prompt in dict.fromkeys(prompts):
            own = torch.tensor(list(self._rewards[prompt]))
            known[prompt] = (own.mean(), own.std(correction=0)) if len(own) >= self.minimum else batch
        mean, std = torch.tensor([known[prompt] for prompt in prompts]).to(rewards).T
        return (rewards - mean) / (std + 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """The prompts, how many rewards each has, and all rewards in one tensor: a list each would take seconds."""
        buffers = self._rewards.values()
        rewards = torch.tensor([reward for own in buffers for reward in own], dtype=torch.float64)
        return {"prompts": list(self._rewards), "counts": [len(own) for own in buffers], "rewards": rewards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the buffers."""
        rewards = iter(state["rewards"].tolist())
        self._rewards = {
            prompt: deque(itertools.islice(rewards, count), maxlen=self.buffer)
            for prompt, count in zip(state["prompts"], state["counts"], strict=True)
        }


def group_baseline(prompts: list[str], rewards: Tensor) -> Tensor:
    """Mean [B] of the other rewards [B] of the same prompt, 0 for a prompt's only sample: an unbiased baseline."""
    own = _same_prompt(prompts, rewards)
    return (own @ rewards - rewards) / (own.sum(1) - 1).clamp(min=1)


def group_normalised(prompts: list[str], rewards: Tensor, deviation: Deviation | None = None) -> Tensor:
    """Rewards [B] minus their prompt's mean, over a deviation (Shao et al., 2024, GRPO); 0 for a single sample.

    deviation: the prompt's own, of the population and with 1e-6 added, unless given.
    """
    deviation = deviation or Deviation()
    own = _same_prompt(prompts, rewards)
    count = own.sum(1)
    centred = rewards - own @ rewards / count
    if deviation.over == "round":
        std = rewards.std(correction=deviation.correction) if len(rewards) > 1 else torch.zeros_like(rewards)
    else:
        std = (own @ centred**2 / (count - deviation.correction).clamp(min=1)).sqrt()
    return centred / (std + deviation.epsilon)


def group_advantages(core: Core, data: Trajectory, deviation: Deviation) -> Tensor:
    """Advantages [B]: `group_normalised` rewards; with `reward.combine: advantages` the weighted sum of those of its
    terms, so that a reward's unit gives it no weight."""
    if data.terms is None:
        return group_normalised(data.prompts, data.rewards, deviation)
    apart = (group_normalised(data.prompts, term, deviation) for term in data.terms.unbind(1))
    return sum(weight * own for weight, own in zip(core.reward_model.weights, apart, strict=True))


def group_tilt(prompts: list[str], values: Tensor) -> Tensor:
    """`e^v / (the mean of e^v over the prompt's other samples)` [B] for values v [B]; 1 for a prompt's only sample."""
    own = _same_prompt(prompts, values)
    others = (own - torch.eye(len(own), dtype=own.dtype, device=own.device)).log()
    mean = torch.logsumexp(values + others, 1) - others.exp().sum(1).log()
    return torch.exp(values - mean).where(own.sum(1) > 1, 1)


def log_softmax_by_prompt(prompts: list[str], values: Tensor) -> Tensor:
    """`log softmax` [B] of values [B] over the rows of the same prompt."""
    return values - torch.logsumexp(values + _same_prompt(prompts, values).log(), 1)


def best_and_worst(prompts: list[str], rewards: Tensor) -> tuple[Tensor, Tensor]:
    """For every row the row of its prompt's largest reward and that of its smallest, long [B]; of equals the first."""
    others = _same_prompt(prompts, rewards) == 0
    best, worst = (rewards.expand(len(rewards), -1).masked_fill(others, sign * float("inf")) for sign in (-1, 1))
    return best.argmax(1), worst.argmin(1)


def leave_one_out(values: Tensor) -> Tensor:
    """Values [B, S] minus the others' mean of the column, over the others' deviation (Zhang et al., 2024, DAG-KL).

    The deviation of row i is the root of the mean over j ≠ i of `(v_j − mean_{l≠j} v_l)²`; a single row gets 0.
    """
    if len(values) < 2:
        return torch.zeros_like(values)
    others = len(values) - 1
    centred = values - (values.sum(0) - values) / others
    squares = centred**2
    return centred / ((squares.sum(0) - squares) / others + 1e-8).sqrt()


def _same_prompt(prompts: list[str], like: Tensor) -> Tensor:
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index = torch.tensor([number[prompt] for prompt in prompts], device=like.device)
    return (index[:, None] == index).to(like)
