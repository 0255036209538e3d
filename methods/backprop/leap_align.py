"""LeapAlign: two leaps stand in for the trajectory when the gradient goes back."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bench import NFE, Batch, Core, Loss, Method, Needs


class LeapAlign(Method):
    """LeapAlign: backpropagate the reward through two leaps between random steps instead of the whole trajectory.

        L(θ) = −E[ r(z_K) ],   with the gradient of   z_k → z_j = α_j x̂_θ(z_k) + s_j ε̂_θ(z_k) → z_K = x̂_θ(z_j)

    k < j are two random steps of each sample. All values are those of the sampled trajectory: a leap only lends its
    gradient to the state where it lands (straight-through). β is not used.

    LeapAlign, https://arxiv.org/abs/2604.15311
    """

    needs = Needs(trajectory=False, reward_gradient=True)
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

            clean = kernel.clean(z_j, core.predict(z_j, j, part.conditioning), j)
            reward = core.reward(straight_through(path.latents[:, -1], clean), part.prompts)
            yield Loss(-reward, {"reward": reward.detach()})

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, 2], on the CPU: the steps k < j of each sample."""
        pairs = [core.rng(*name).choice(core.kernel.steps, 2, replace=False) for name in data.samples]
        return torch.tensor(np.sort(np.stack(pairs), axis=1))

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself; the predictions at z_k and z_j learn."""
        return NFE(rollout=0, forward=(core.kernel.steps + 2) * len(batch), backward=2 * len(batch))


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return value + surrogate - surrogate.detach()
