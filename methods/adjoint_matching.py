"""Adjoint Matching (Domingo-Enrich et al., "Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with
Memoryless Stochastic Optimal Control", ICLR 2025)."""

from collections.abc import Iterator

from pydantic import Field

from bench import Config, Core, Loss, Method, Needs, Trajectory


class AdjointMatchingConfig(Config):
    """Options of Adjoint Matching."""

    fraction: float = Field(
        0.15, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none"
    )


class AdjointMatching(Method):
    """Regress the control on the lean adjoint: `‖(μ_θ − μ_#)/σ_k + σ_k a_{k+1}‖²`, sum over elements.

    `a_K = −β ∇ r(decode(z_K))` and `a_k = (∂μ_#/∂z_k)ᵀ a_{k+1}` at the states that the policy sampled. The authors'
    code pairs step k with `a_k`, which is right in continuous time only; `a_{k+1}` is exact for the discrete chain and
    has the target `p_# exp(βr)` for a memoryless sampler (η = 1). Guidance is the same in policy and prior.
    """

    Config = AdjointMatchingConfig
    needs = Needs(reward_gradient=True, density=True)
    recipe = {"optimizer.lr": 3e-6, "optimizer.betas": (0.9, 0.95), "optimizer.clip": None}
    config: AdjointMatchingConfig

    def tilted(self) -> bool:
        """Always."""
        return True

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over a random subset of every trajectory's transitions, the last always among them."""
        steps = core.choose_steps(data, self.config.fraction)
        adjoint, prior_means, rewards = core.lean_adjoint(data, steps.min(1).values)
        for part in data.transitions(steps, core.micro_batch):
            output = core.predict(part.z, part.k, part.conditioning)
            mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
            control = (mean - prior_means[part.row, part.k]) / std
            values = (control + std * adjoint[part.row, part.k + 1]).square().flatten(1).sum(1)
            yield Loss(values / steps.shape[1], {"reward": rewards[part.row[part.finished]]})
