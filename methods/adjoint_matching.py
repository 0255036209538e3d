"""Adjoint Matching, and the lean adjoint that it regresses on."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from bench import NFE, TILT, Batch, Config, Core, Loss, Method, Needs, Trajectory


class AdjointMatchingConfig(Config):
    """Options of Adjoint Matching."""

    fraction: float = Field(
        0.15, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none"
    )


class AdjointMatching(Method):
    """Adjoint Matching: regress the control on the lean adjoint; it samples from p_# exp(βr).

    The loss of a transition is, as a sum over elements,

        ‖ (μ_θ(z_k) − μ_#(z_k)) / σ_k + σ_k a_{k+1} ‖²,
        a_K = −β ∇ r(decode(z_K)),   a_k = (∂μ_#/∂z_k)ᵀ a_{k+1},

    at the states that the policy sampled. The authors' code pairs step k with `a_k`, which is right in continuous time
    only; with `a_{k+1}` the discrete chain has the target p_# exp(βr) exactly if the sampler is memoryless (η = 1).
    Policy and prior have the same guidance.

    Domingo-Enrich et al., "Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless
    Stochastic Optimal Control", ICLR 2025, https://arxiv.org/abs/2409.08861
    """

    Config = AdjointMatchingConfig
    needs = Needs(reward_gradient=True, density=True, memoryless=True, uneven=True)
    recipe = {"optimizer.lr": 3e-6, "optimizer.betas": (0.9, 0.95), "optimizer.clip": None}
    strength = TILT
    config: AdjointMatchingConfig

    def tilted(self) -> bool:
        """Always."""
        return True

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, S], on the CPU: a random subset of every trajectory's steps, the last always among them."""
        return core.choose_steps(data, self.config.fraction)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions of every trajectory."""
        steps = self.steps(core, data)
        adjoint, prior_means, rewards = lean_adjoint(core, data, steps.min(1).values)
        for part in data.transitions(steps, core.micro_batch):
            output = core.predict(part.z, part.k, part.conditioning)
            mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
            control = (mean - prior_means[part.row, part.k]) / std
            values = (control + std * adjoint[part.row, part.k + 1]).square().flatten(1).sum(1)
            yield Loss(values / steps.shape[1], {"reward": rewards[part.row[part.finished]]})

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at the chosen states; the prior from the first of them on, and its Jacobian from the next."""
        steps, count, total = self.steps(core, batch), len(batch), core.kernel.steps
        prior = total * count - int(steps.min(1).values.sum())
        return NFE(total * count, forward=steps.numel() + prior, backward=steps.numel() + prior - count)


def lean_adjoint(core: Core, data: Trajectory, first: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The lean adjoint `a_K = −β ∇ r(decode(z_K))`, `a_k = (∂μ_#/∂z_k)ᵀ a_{k+1}` at sampled states.

    first: long [B] on the CPU, the earliest step needed of each trajectory (None: 0); what lies before is NaN.
    Returns `a_0 … a_K` [B, K+1, *latent], the prior's means `μ_#(z_k)` [B, K, *latent] and the rewards [B], all
    detached. It is computed in parts of `core.micro_batch` trajectories.
    """
    if first is None:
        first = torch.zeros(len(data), dtype=torch.long)
    pairs = zip(data.split(core.micro_batch), first.split(core.micro_batch), strict=True)
    parts = [_lean_adjoint(core, rows, first_step) for rows, first_step in pairs]
    adjoint, prior_means, rewards = map(torch.cat, zip(*parts, strict=True))
    return adjoint, prior_means, rewards


def _lean_adjoint(core: Core, data: Trajectory, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rewards, reward_score = core.reward_gradient(data.latents[:, -1], data.prompts)
    adjoint = torch.full_like(data.latents, float("nan"))
    adjoint[:, -1] = -core.beta * reward_score
    prior_means = torch.full_like(data.latents[:, 1:], float("nan"))
    for k in reversed(range(int(first.min()), core.kernel.steps)):
        needed = (first <= k).nonzero().flatten()
        part = data.transitions_at(needed, torch.full_like(needed, k))
        z = part.z.detach().requires_grad_()
        mean = core.kernel.mean(z, core.predict(z, k, part.conditioning, prior=True), k)
        adjoint[part.row, k] = torch.autograd.grad(mean, z, adjoint[part.row, k + 1])[0]
        prior_means[part.row, k] = mean.detach()
    return adjoint, prior_means, rewards
