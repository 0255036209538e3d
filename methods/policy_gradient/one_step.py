"""Policy gradients within groups whose trajectories have noise, and a gradient, in one step each."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import Batch, Core, Needs, Trajectory, Transitions
from bench.sampling.trajectory import join

from .base import Clip, GroupPolicyGradient, GroupPolicyGradientConfig, old_policy
from .surrogate import Surrogate, clipped, gaussian_log_ratio


class OneStepConfig(GroupPolicyGradientConfig):
    """Options of a policy gradient in one step."""

    clip: Clip = 1e-4


class OneStep(GroupPolicyGradient):
    """Policy gradient within groups, in one step k of each trajectory; the other steps have no noise.

        ℓ = c_k max(−A ρ_k, −A clip(ρ_k, 1 ± c)),   log ρ_k = (‖z_{k+1} − μ_old‖² − ‖z_{k+1} − μ_θ‖²) / 2σ_k²

    All samples of a prompt have one k, drawn anew in every round, so that they differ in its noise. A subclass says
    among which steps, and what c_k is.
    """

    needs = Needs(rewards=True, density=True, uneven=True, record=frozenset({"model_output"}))
    config: OneStepConfig

    @abstractmethod
    def pool(self, core: Core) -> range:
        """The steps that k is drawn from."""

    @abstractmethod
    def weight(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        """c_k [n] of the steps k [n]; like: latents [n, *latent]."""

    def start(self, batch: Batch) -> Sequence[tuple[str, int]] | None:
        """The names of the rows' first noise; None: their own."""
        return None

    def drawn(self, core: Core, batch: Batch, number: int) -> Tensor:
        """k of each row [B] in round `number`, on the CPU."""
        pool = self.pool(core)
        chosen = {p: int(core.rng(p, "step", number).integers(pool.start, pool.stop)) for p in set(batch.prompts)}
        return torch.tensor([chosen[prompt] for prompt in batch.prompts])

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Trajectories with noise in the drawn step alone."""
        steps, start, parts, order = self.drawn(core, batch, number), self.start(batch), [], []
        for k in sorted(set(steps.tolist())):
            rows = (steps == k).nonzero().flatten()
            names = start and [start[i] for i in rows.tolist()]
            part = batch[rows]
            parts.append(core.rollout(part, record=self.needs.record, noisy=(k, k + 1), start=names))
            order.append(rows)
        return join(parts)[torch.cat(order).argsort()]

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The step with noise [B, 1], or the first round's before there are trajectories."""
        if isinstance(data, Trajectory) and data.noisy is not None:
            return data.noisy.cpu()
        return self.drawn(core, data, 0)[:, None]

    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ [n] without a KL term."""
        old_mean, std = old_policy(core, part)
        loss, metrics = clipped(gaussian_log_ratio(part.z_next, mean, old_mean, std), part.advantages, self.config.clip)
        weight = self.weight(core, part.k, part.z)
        return weight * loss, metrics | {"weight": weight}
