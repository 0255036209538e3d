"""What is made of a round's rewards: advantages within a prompt's samples, and other comparisons among them.

A prompt's samples of one round are its group. Rewards are [B], one a sample, and `prompts` are the samples' B prompts.
"""

import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from bench.core import Core
from bench.options import Config
from bench.sampling.noise import upload
from bench.sampling.trajectory import Trajectory


class Deviation(Config):
    """The standard deviation that a centred reward is divided by; published codes differ in all three options."""

    over: Literal["group", "round"] = Field("group", description="the prompt's samples, or all of the round")
    correction: Literal[0, 1] = Field(0, description="0: of the population, 1: unbiased")
    epsilon: float = Field(1e-6, ge=0, description="added to it")


def group_advantages(core: Core, data: Trajectory, deviation: Deviation) -> Tensor:
    """Advantages [B] of a round: its rewards, normalised by `group_normalised`.

    With `reward.combine: advantages` each term of a weighted sum of rewards is normalised apart, and the advantage is
    their weighted sum: a term's weight then does not depend on the term's unit. `reward.combine: gdpo` is
    `decoupled_advantages`.
    """
    rewards, weighted = cast(Tensor, data.rewards), cast(Any, core.reward_model)
    if data.terms is None:
        return group_normalised(data.prompts, rewards, deviation)
    if weighted.config.combine == "gdpo":
        return decoupled_advantages(data.prompts, data.terms, weighted.weights)
    total = torch.zeros_like(rewards)
    for weight, term in zip(weighted.weights, data.terms.unbind(1), strict=True):
        total = total + weight * group_normalised(data.prompts, term, deviation)
    return total


def decoupled_advantages(prompts: list[str], terms: Tensor, weights: Sequence[float]) -> Tensor:
    """GDPO's advantages [B] for terms [B, R]: each normalised in its group, summed, normalised over the round.

    Deviations are the population's. Where a group's deviation of a term is below 1e-4 of the mean, the values are equal
    but for rounding, and count as equal.

    Liu et al., "GDPO: Group reward-Decoupled Normalization Policy Optimization", 2026, https://arxiv.org/abs/2601.05242
    """
    total = terms.new_zeros(len(terms))
    for weight, term in zip(weights, terms.unbind(1), strict=True):
        mean = group_mean(prompts, term)
        std = group_mean(prompts, (term - mean) ** 2).sqrt()
        advantages = (term - mean) / std.clamp(min=1e-6)
        total = total + weight * advantages.masked_fill(std < 1e-4 * mean.abs(), 0)
    return (total - total.mean()) / total.std(correction=0).clamp(min=1e-6)


def group_normalised(prompts: list[str], rewards: Tensor, deviation: Deviation | None = None) -> Tensor:
    """`A = (r − mean) / (std + ε)` [B], with the mean of the group (Shao et al., 2024, GRPO).

    0 for a single sample and for a group of equal rewards, whose centred values are rounding errors. deviation: how std
    is estimated; by default the group's, of the population, and ε = 1e-6.
    """
    deviation = deviation or Deviation()
    same = _same_prompt(prompts, rewards)
    count = same.sum(1)
    others, table = same == 0, rewards.expand(len(rewards), -1)
    equal = table.masked_fill(others, -torch.inf).amax(1) == table.masked_fill(others, torch.inf).amin(1)
    centred = (rewards - same @ rewards / count).masked_fill(equal, 0)
    if deviation.over == "group":
        std = (same @ centred**2 / (count - deviation.correction).clamp(min=1)).sqrt()
    elif len(rewards) > 1:
        std = rewards.std(correction=deviation.correction)
    else:
        std = torch.zeros_like(rewards)
    return centred / (std + deviation.epsilon)


def group_baseline(prompts: list[str], rewards: Tensor) -> Tensor:
    """Mean [B] of the group's other rewards: an unbiased baseline; 0 for a single sample."""
    same = _same_prompt(prompts, rewards)
    return (same @ rewards - rewards) / (same.sum(1) - 1).clamp(min=1)


def group_mean(groups: Sequence[Hashable], values: Tensor) -> Tensor:
    """The mean [n] of the values [n] that have the same group, for each of them."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = upload(torch.tensor([numbers[group] for group in groups]), values.device)
    zeros = values.new_zeros(len(numbers))
    total, count = zeros.index_add(0, index, values), zeros.index_add(0, index, torch.ones_like(values))
    return (total / count)[index]


def group_tilt(prompts: list[str], values: Tensor) -> Tensor:
    """`e^v / (mean of e^v over the group's other samples)` [B] for values v [B]; 1 for a single sample."""
    same = _same_prompt(prompts, values)
    others = same - torch.eye(len(same), dtype=same.dtype, device=same.device)
    log_mean = torch.logsumexp(values + others.log(), 1) - others.sum(1).log()
    return torch.exp(values - log_mean).where(same.sum(1) > 1, 1)


def log_softmax_by_prompt(prompts: list[str], values: Tensor) -> Tensor:
    """`log softmax` [B] of values [B] within each group."""
    return values - torch.logsumexp(values + _same_prompt(prompts, values).log(), 1)


def best_and_worst(prompts: list[str], rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the largest and of the smallest reward of each sample's group, long [B] each; of equals the first."""
    other_prompt = _same_prompt(prompts, rewards) == 0
    table = rewards.expand(len(rewards), -1)
    best = table.masked_fill(other_prompt, -float("inf")).argmax(1)
    worst = table.masked_fill(other_prompt, float("inf")).argmin(1)
    return best, worst


def leave_one_out(values: Tensor) -> Tensor:
    """Values [B, S], each normalised by the other rows of its column (Zhang et al., 2024, DAG-KL).

    `A_i = c_i / √(mean of c_j² over j ≠ i)` with `c_i = v_i − mean of v_j over j ≠ i`; 0 for a single row.
    """
    if len(values) < 2:
        return torch.zeros_like(values)
    others = len(values) - 1
    centred = values - (values.sum(0) - values) / others
    squares = centred**2
    return centred / ((squares.sum(0) - squares) / others + 1e-8).sqrt()


class PromptStatistics:
    """Rewards normalised by the last `buffer` rewards of their prompt (Black et al., 2024, DDPO).

    While a prompt has fewer than `minimum` rewards, the mean and deviation of the whole round stand in.
    """

    def __init__(self, buffer: int, minimum: int):
        self.buffer, self.minimum = buffer, minimum
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """`(r − mean) / (std + 1e-6)` [B] for rewards [B], after adding them to the buffers."""
        values = rewards.tolist()  # on the host, as the buffers are
        for prompt, reward in zip(prompts, values, strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        whole_round, statistics = _mean_and_std(values), {}
        for prompt in dict.fromkeys(prompts):
            buffer = self._rewards[prompt]
            statistics[prompt] = _mean_and_std(buffer) if len(buffer) >= self.minimum else whole_round
        mean, std = upload(torch.tensor([statistics[prompt] for prompt in prompts]), rewards.device).to(rewards).T
        return (rewards - mean) / (std + 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """The prompts, how many rewards each has, and all rewards in one tensor: a list each would take seconds."""
        rewards = list(itertools.chain.from_iterable(self._rewards.values()))
        return {
            "prompts": list(self._rewards),
            "counts": [len(buffer) for buffer in self._rewards.values()],
            "rewards": torch.tensor(rewards, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the buffers."""
        rewards = iter(state["rewards"].tolist())
        self._rewards = {
            prompt: deque(itertools.islice(rewards, count), maxlen=self.buffer)
            for prompt, count in zip(state["prompts"], state["counts"], strict=True)
        }


def _mean_and_std(values: Iterable[float]) -> tuple[Tensor, Tensor]:
    """Mean and population deviation, without rounding errors where all values are equal."""
    sample = torch.tensor(list(values))
    if (sample == sample[0]).all():
        return sample[0], torch.zeros(())
    return sample.mean(), sample.std(correction=0)


def _same_prompt(prompts: list[str], like: Tensor) -> Tensor:
    """Which samples share a prompt, 0 or 1 [B, B], of the dtype and on the device of `like`."""
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index = upload(torch.tensor([numbers[prompt] for prompt in prompts]), like.device)
    return (index[:, None] == index).to(like)
