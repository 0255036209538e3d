"""∇-GFlowNet: gradient-informed detailed balance (Liu et al., "Efficient Diversity-Preserving Diffusion Alignment via
Gradient-Informed GFlowNets", ICLR 2025)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bench import Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory, Transitions


class NablaConfig(Config):
    """Options of the ∇-GFlowNet family; symbols as in the class docstring."""

    residual: bool = Field(True, description="residual ∇-DB (target p_# exp(βr)); false: plain ∇-DB (target exp(βr))")
    flow: bool = Field(True, description="train g_φ; false keeps the forward loss alone")
    fraction: float = Field(0.1, ge=0, le=1, description="transitions used, besides the last one, over K")
    gamma: Literal["alpha", "sqrt_alpha", "one"] = Field("alpha", description="γ_k of the forward-looking term")
    weighting: Literal["score", "kl"] = Field("kl", description="'kl' multiplies transition losses by σ_k²")
    detach_target: bool = Field(True, description="keep the forward loss's gradient out of g_φ")
    flow_target: Literal["policy", "adjoint"] = Field(
        "policy", description="what g_φ regresses on: the policy's reverse score, or the lean adjoint (our variant)"
    )
    reverse: Literal["pathwise", "expected"] = Field("expected", description="the reverse score, or its mean on-policy")
    reverse_weight: float = Field(1.0, ge=0, description="w_B")
    trust: float = Field(0.0, ge=0, description="λ of the trust region")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the flow network g_φ")

    @model_validator(mode="after")
    def _expected_needs_prior(self) -> "NablaConfig":
        if self.reverse == "expected" and not self.residual:
            raise ValueError("reverse: expected is the mean of the residual score; use residual: true, or pathwise")
        if self.flow_target == "adjoint" and not (self.residual and self.flow):
            raise ValueError("flow_target: adjoint is the residual flow's; use residual: true and flow: true")
        return self


class NablaGFN(Method):
    """(Residual) ∇-DB with the forward-looking parameterisation.

    `∇ log F̃(z_k) = β γ_k sg[∇_{z_k} r(decode(ẑ_θ(z_k)))] + g_φ(z_k)` and `∇ log F̃(z_K) = β ∇ r(decode(z_K))`.
    For a transition `z_k → z_{k+1}`, means over elements:

    - forward  `L_fwd = ‖(μ_θ − μ_#)/σ_k² − ∇ log F̃(z_{k+1})‖²`
    - reverse  `L_rev = ‖sg[∇_{z_k} log (p_θ/p_#)(z_{k+1}|z_k)] + ∇ log F̃(z_k)‖²`, trains g_φ only, every k
    - terminal `L_term = ‖g_φ(z_K)‖²` on the last transition
    - trust    `λ ‖ε_θ − ε_old‖²`, ε_old the prediction of the policy that sampled

    Plain ∇-DB replaces the prior's transition score by the noising kernel's (`residual: false`). `nabla_gfn_adjoint`,
    which goes beyond the paper, lets g_φ regress on the lean adjoint of Adjoint Matching, `∇ log F̃(z_k) = −a_k`, so
    that the reward's information need not walk back through the policy one step at a time.
    """

    Config = NablaConfig
    needs = Needs(reward_gradient=True, density=True, record=frozenset({"model_output"}))
    recipe = {
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.networks.flow.weight_decay": 1e-2,
    }
    config: NablaConfig

    def tilted(self) -> bool:
        """Residual ∇-DB with its flow network."""
        return self.config.residual and self.config.flow

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """The flow network `g_φ`, zero at the start."""
        return {"flow": model.latent_network(self.config.channels)} if self.config.flow else {}

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over a random subset of every trajectory's transitions, the last always among them."""
        steps = core.choose_steps(data, self.config.fraction)
        adjoint = core.lean_adjoint(data)[0] if self.config.flow_target == "adjoint" else None
        for part in data.transitions(steps, core.micro_batch):
            known = None if adjoint is None else adjoint[part.row, part.k]
            values, metrics = self.transition_losses(core, part, known)
            yield Loss(values / steps.shape[1], metrics)

    def transition_losses(
        self, core: Core, part: Transitions, adjoint: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each transition [n], and its parts; adjoint: `a_k` [n, *latent], which then is g_φ's target."""
        config = self.config
        variance = core.kernel.std(part.k, part.z) ** 2
        weight = variance.flatten() if config.weighting == "kl" else torch.ones_like(variance.flatten())
        last = part.k == core.kernel.steps - 1

        z = part.z.detach().requires_grad_(config.flow)
        eps = core.predict(z, part.k, part.conditioning)
        mean = core.kernel.mean(z, eps, part.k)
        with torch.set_grad_enabled(config.flow):  # the reverse score needs the prior's Jacobian too
            prior_eps = core.predict(z, part.k, part.conditioning, prior=True) if config.residual else None
            prior_mean = None if prior_eps is None else core.kernel.mean(z, prior_eps, part.k)
        target, rewards = self.reward_score(core, part)
        score = self.forward_score(core, part, mean, prior_mean, variance)
        losses = {}
        if config.flow:
            own = core.network("flow", part.z_next, part.k + 1, part.conditioning)
            known = last.view(-1, *(1,) * (own.ndim - 1))  # the finished sample's flow is the reward alone
            target = target + (own.detach() if config.detach_target else own).masked_fill(known, 0)
            back = self.reverse_score(core, part, z, mean, prior_mean, variance) if adjoint is None else adjoint
            reverse = self.reverse_loss(core, part, z, eps, back)
            losses["reverse"] = config.reverse_weight * weight * reverse
            losses["terminal"] = self.terminal_loss(own, last)
        losses["forward"] = weight * _mean_square(score - target)
        if config.trust:
            losses["trust"] = config.trust * _mean_square(eps - part.model_output)
        return sum(losses.values()), {**{name: v.detach() for name, v in losses.items()}, "reward": rewards[last]}

    def reward_score(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor]:
        """`β γ_{k+1} ∇ r(decode(ẑ_θ(z_{k+1})))` [n, *latent], and the rewards [n] of these clean latents; detached."""
        z, k = part.z_next.detach().requires_grad_(), part.k + 1
        inner = k < core.kernel.steps
        clean = z
        if bool(inner.any()):
            eps = core.predict(z[inner], k[inner], part.conditioning[inner])
            clean = z.index_put((inner,), core.kernel.clean(z[inner], eps, k[inner]))
        rewards, gradient = core.reward_gradient(clean, z, part.prompts)
        return core.beta * self.gamma(core, k, z) * gradient, rewards

    def reverse_loss(self, core: Core, part: Transitions, z: Tensor, eps: Tensor, score: Tensor) -> Tensor:
        """`L_rev` [n] of the score [n, *latent], unweighted; `eps` carries the graph from `z`."""
        clean = core.kernel.clean(z, eps, part.k)
        _, gradient = core.reward_gradient(clean, z, part.prompts, retain_graph=True)
        own = core.network("flow", part.z, part.k, part.conditioning)
        return _mean_square(score + core.beta * self.gamma(core, part.k, z) * gradient + own)

    def terminal_loss(self, own: Tensor, last: Tensor) -> Tensor:
        """`L_term` [n] of `own = g_φ(z_{k+1})`, zero but where `last`."""
        return _mean_square(own) * last

    def gamma(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        """`γ_k`, shaped to broadcast over `like`; 1 at k = K."""
        alpha = core.kernel.alphas[k]
        powers = {"alpha": alpha, "sqrt_alpha": alpha**0.5, "one": torch.ones_like(alpha)}
        gamma = torch.where(k == core.kernel.steps, torch.ones_like(alpha), powers[self.config.gamma])
        return gamma.view(-1, *(1,) * (like.ndim - 1))

    def forward_score(
        self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor | None, variance: Tensor
    ) -> Tensor:
        """`∇_{z_{k+1}}` of `log p_θ/p_#`, or of `log p_θ/p_B` for plain ∇-DB; [n, *latent]."""
        if prior_mean is not None:
            return (mean - prior_mean.detach()) / variance
        back_mean, back_std = core.kernel.noising(part.z_next, part.k)
        root = core.kernel.noising(torch.ones_like(part.z_next), part.k)[0]
        return (mean - part.z_next) / variance - root * (part.z - back_mean) / back_std**2

    def reverse_score(
        self, core: Core, part: Transitions, z: Tensor, mean: Tensor, prior_mean: Tensor | None, variance: Tensor
    ) -> Tensor:
        """`∇_{z_k}` of the same log-ratio with `z_{k+1}` held fixed, detached; [n, *latent]."""
        if prior_mean is not None and self.config.reverse == "expected":
            drift = ((mean - prior_mean) / variance).detach()
            return -torch.autograd.grad(prior_mean, z, drift)[0]
        log_ratio = -((part.z_next - mean) ** 2) / (2 * variance)
        if prior_mean is not None:
            log_ratio = log_ratio + (part.z_next - prior_mean) ** 2 / (2 * variance)
        (score,) = torch.autograd.grad(log_ratio.sum(), z, retain_graph=True)
        if prior_mean is None:
            back_mean, back_std = core.kernel.noising(part.z_next, part.k)
            score = score + (part.z - back_mean) / back_std**2
        return score


def _mean_square(x: Tensor) -> Tensor:
    return (x**2).flatten(1).mean(1)
