"""LeapAlign: two leaps stand in for the trajectory when the gradient goes back."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bench import NFE, Batch, Core, Loss

from .base import RewardBackpropagation


class LeapAlign(RewardBackpropagation):
    """LeapAlign: backpropagate the reward through two leaps between random steps instead of the whole trajectory.

        L(θ) = −E[ r(z_K) ],   with the gradient of   z_k → z_j = α_j x̂_θ(z_k) + s_j ε̂_θ(z_k) → z_K = x̂_θ(z_j)

    k < j are two random steps of each sample. All values are those of the sampled trajectory: a leap only lends its
    gradient to the state where it lands (straight-through). A KL is that at z_k and z_j.

    LeapAlign, https://arxiv.org/abs/2604.15311
    """

    needs = replace(RewardBackpropagation.needs, denoiser=True)
    recipe = {"optimizer.lr": 4e-4, "optimizer.weight_decay": 1e-4}

    def unfit(self, steps: int, group: int) -> str | None:
        """The two steps differ."""
        return "two leaps need sampler.steps ≥ 2" if steps < 2 else None

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples."""
        kernel = core.kernel
        for part in data.split(core.micro_batch):
            path, n = core.rollout(part), len(part)
            (both,) = path.transitions(self.steps(core, part), 2 * n)  # n rows at step k, then n rows at step j
            (k, j), (z_k, z_j) = both.k.split(n), both.z.split(n)

            output = core.predict(z_k, k, part.conditioning)
            leap = kernel.noised(kernel.clean(z_k, output, k), kernel.noise(z_k, output, k), j)
            z_j = straight_through(z_j, leap)

            output_j = core.predict(z_j, j, part.conditioning)
            clean = kernel.clean(z_j, output_j, j)
            reward = core.reward(straight_through(path.latents[:, -1], clean), part.prompts)
            visited = [(z_k, output, k), (z_j, output_j, j)]
            yield Loss(self.with_kl(core, part, -reward, visited), {"reward": reward.detach()})

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, 2], on the CPU: the steps k < j of each sample."""
        pairs = [core.rng(*name).choice(core.kernel.steps, 2, replace=False) for name in data.samples]
        return torch.tensor(np.sort(np.stack(pairs), axis=1))

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself; the predictions at z_k and z_j learn."""
        count = len(batch)
        prior, prior_back = self.prior_nfe(2 * count, count)
        return NFE(rollout=0, forward=(core.kernel.steps + 2) * count + prior, backward=2 * count + prior_back)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return value + surrogate - surrogate.detach()
