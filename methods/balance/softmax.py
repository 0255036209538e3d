"""Trajectory balance within a prompt's group of samples, where a softmax takes the place of log Z."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import NFE, TILT, Batch, Core, Loss, Method, Needs, Trajectory, log_softmax_by_prompt, two_passes

from .rtb import log_density


class LogRatios(NamedTuple):
    """The log-ratios ℓ of n trajectories, and the rewards that they are compared with; float [n], without gradient."""

    prompts: list[str]
    rewards: Tensor
    log_ratio: Tensor


class SoftmaxRTB(Method):
    """Trajectory balance within a prompt's group, without log Z; it samples from p_# exp(βr).

    With `ℓ_i = Σ_k [log p_θ(z_{k+1}|z_k) − log p_#(z_{k+1}|z_k)]` of sample i, the loss of the sample is

        ( log softmax_i ℓ − log softmax_i βr )²,

    where the softmax is over the samples of the same prompt: the group takes the place of the learned log Z of `RTB`.

    A group's loss L is a function of all its log-ratios. Its gradient is that of `Σ_i (∂L/∂ℓ_i) Σ_k log p_θ` with the
    slopes `∂L/∂ℓ_i` detached. If a micro-batch does not hold whole groups, a pass without gradient over all
    trajectories comes first, which gives the slopes.
    """

    needs = Needs(rewards=True, density=True, memoryless=True, whole_update=True)
    recipe = {"optimizer.lr": 1e-4}
    strength = TILT

    def tilted(self) -> bool:
        """Always."""
        return True

    def unfit(self, steps: int, group: int) -> str | None:
        """In a group of one the softmax is 1, whatever the policy."""
        why = "a softmax over one update's samples of a prompt needs train.samples_per_prompt > train.updates_per_round"
        return why if group < 2 else None

    def log_reference(self, core: Core, data: Trajectory) -> Tensor:
        """What `Σ_k log p_θ` is compared with: `Σ_k log p_#` [B], float64."""
        return log_density(core, data, prior=True)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """One micro-loss per micro-batch of whole trajectories, at least one; of whole groups where they fit."""
        size = max(1, core.micro_batch // core.kernel.steps)
        parts = pack_groups(data.prompts, size)
        whole_groups = max(map(len, parts)) <= size
        if not whole_groups:
            parts = torch.arange(len(data)).split(size)

        def log_policies(first: list[LogRatios] | None) -> Iterator[tuple[Tensor, LogRatios]]:
            for i, rows in enumerate(data[part] for part in parts):
                log_policy = log_density(core, rows)
                if first:
                    yield log_policy, first[i]
                else:
                    log_ratio = log_policy.detach() - self.log_reference(core, rows)
                    yield log_policy, LogRatios(rows.prompts, rows.rewards, log_ratio)

        balance = partial(balance_groups, core.beta)
        for log_policy, (log_softmax, losses, slope) in two_passes(log_policies, balance, complete=whole_groups):
            yield Loss(losses + slope * (log_policy - log_policy.detach()), {"log_softmax": log_softmax})

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy and the prior at every state; a second pass of the policy only saves memory."""
        states = core.kernel.steps * len(batch)
        return NFE(rollout=states, forward=2 * states, backward=states)


class TMPO(SoftmaxRTB):
    """TMPO: trajectory balance within a prompt's group, without log Z and without the prior.

    The loss is `SoftmaxRTB`'s with `ℓ_i = Σ_k log p_θ(z_{k+1}|z_k)`: within a group the density of a sampled trajectory
    is to be proportional to exp(βr).

    "TMPO", arXiv 2605.10983, https://arxiv.org/abs/2605.10983
    """

    def tilted(self) -> bool:
        """Not against the prior."""
        return False

    def log_reference(self, core: Core, data: Trajectory) -> Tensor:
        """Zero."""
        return torch.zeros_like(data.rewards)

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at every state."""
        states = core.kernel.steps * len(batch)
        return NFE(rollout=states, forward=states, backward=states)


def pack_groups(prompts: list[str], size: int) -> list[Tensor]:
    """The rows of every prompt, as many whole groups together as `size` rows hold; long tensors on the CPU."""
    parts: list[list[int]] = [[]]
    for prompt in dict.fromkeys(prompts):
        group = [i for i, other in enumerate(prompts) if other == prompt]
        if len(parts[-1]) + len(group) <= size:
            parts[-1] += group
        else:
            parts.append(group)
    return [torch.tensor(part) for part in parts if part]


def balance_groups(beta: float, parts: list[LogRatios]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`log softmax ℓ`, the losses and `∂L/∂ℓ` of each part, all [n] and detached; together they hold whole groups."""
    prompts = [prompt for part in parts for prompt in part.prompts]
    log_ratio = torch.cat([part.log_ratio for part in parts]).requires_grad_()
    log_softmax = log_softmax_by_prompt(prompts, log_ratio)
    log_target = log_softmax_by_prompt(prompts, beta * torch.cat([part.rewards for part in parts]))
    losses = (log_softmax - log_target) ** 2
    (slope,) = torch.autograd.grad(losses.sum(), log_ratio)
    sizes = [len(part.prompts) for part in parts]
    return zip(log_softmax.detach().split(sizes), losses.detach().split(sizes), slope.split(sizes), strict=True)
