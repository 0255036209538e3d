"""Residual ∇-DB, the default of the ∇-GFlowNet family, and the same without its flow network."""

import torch
from torch import Tensor, nn

from bench import NFE, Batch, Core, DiffusionModel, Transitions

from .base import FlowConfig, NablaConfig, NablaMethod, at, mean_square


class NablaGFN(NablaMethod):
    """Residual ∇-DB (∇-GFlowNet): samples from `p_# exp(βr)`, with the reverse loss in expectation.

    The residual flow `F̃` says what reward lies ahead of a state, `F̃(z_k) = E_#[exp(β r) | z_k]`. Its score is
    parameterised by the reward's gradient at the clean prediction and a network `g_φ`:

        ∇ log F̃(z_k) = β γ_k sg[∇_{z_k} r(decode(ẑ_θ(z_k)))] + g_φ(z_k),    ∇ log F̃(z_K) = β ∇ r(decode(z_K)).

    Balance of the policy `p_θ` against the prior `p_#` and `F̃`, differentiated in either state of a transition, reads

        ∇_{z_{k+1}} log (p_θ/p_#)(z_{k+1}|z_k) = (μ_θ − μ_#)(z_k) / σ_k² = ∇ log F̃(z_{k+1}),
        ∇_{z_k} log (p_θ/p_#)(z_{k+1}|z_k) = −∇ log F̃(z_k).

    The mean of the last left side over `z_{k+1} ~ p_θ` is `−(∂μ_#/∂z_k)ᵀ (μ_θ − μ_#)(z_k) / σ_k²`: a function of the
    state alone. So this equation is taken at `z_{k+1}`, where the first one already needs the policy and the reward's
    gradient. Of a transition `z_k → z_{k+1}`, with `‖·‖²` a mean over elements and `w_k = σ_k²`, the losses are

        forward   w_k ‖(μ_θ − μ_#)(z_k) / σ_k² − sg[∇ log F̃(z_{k+1})]‖²                       trains the policy
        reverse   w_{k+1} ‖g_φ + sg[β γ ∇r(decode(ẑ_θ)) − (∂μ_#/∂z)ᵀ (μ_θ − μ_#) / σ²]‖²       at z_{k+1}, if k + 1 < K
        terminal  ‖g_φ(z_K)‖²                                                                 if k + 1 = K
        trust     λ ‖o_θ(z_k) − o_old(z_k)‖²                                                  off by default

    After Liu et al., "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", ICLR 2025,
    https://arxiv.org/abs/2412.07775, whose own choices are `nabla_gfn_published`.
    """

    Config = FlowConfig
    config: FlowConfig

    def transition_losses(self, core: Core, part: Transitions) -> tuple[dict[str, Tensor], Tensor]:
        """The equations above; the graphs of the passes at `z_{k+1}` are freed before the policy's at `z_k` is made."""
        inner = part.unfinished
        reward_score, rewards, next_mean = self.reward_score(core, part)
        reverse_score = self.reverse_score(core, part, next_mean)
        forward_score, output = self.forward_score(core, part)
        flow = core.network("flow", part.z_next, part.k + 1, part.conditioning)
        flow_target = -(reward_score[inner] + reverse_score)
        reverse_loss = self.weight(core, part.k[inner] + 1, flow) * mean_square(flow[inner] - flow_target)
        forward_residual = forward_score - reward_score.index_add(0, inner, flow[inner].detach())
        losses = {
            "reverse": self.config.reverse_weight * at(inner, reverse_loss, len(part)),
            "terminal": self.terminal_loss(part, flow),
            "forward": self.weight(core, part.k, part.z) * mean_square(forward_residual),
        }
        return losses | self.trust_loss(part, output), rewards

    def forward_score(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor]:
        """`∇_{z_{k+1}} log (p_θ/p_#)(z_{k+1}|z_k) = (μ_θ − μ_#) / σ_k²`, and the output `o_θ(z_k)`; [n, *latent]."""
        z, k, mean = part.z, part.k, core.kernel.mean
        with torch.no_grad():
            prior_mean = mean(z, core.predict(z, k, part.conditioning, prior=True), k)
        output = core.predict(z, k, part.conditioning)
        return (mean(z, output, k) - prior_mean) / core.kernel.std(k, z) ** 2, output

    def reverse_score(self, core: Core, part: Transitions, policy_mean: Tensor) -> Tensor:
        """`−(∂μ_#/∂z)ᵀ (μ_θ − μ_#) / σ²` at `z_{k+1}` of the unfinished [m, *latent], detached; of `μ_θ` there."""
        inner = part.unfinished
        if not len(inner):
            return policy_mean
        z, k = part.z_next[inner].requires_grad_(), part.k[inner] + 1
        prior_mean = core.kernel.mean(z, core.predict(z, k, part.conditioning[inner], prior=True), k)
        forward_score = (policy_mean - prior_mean.detach()) / core.kernel.std(k, z) ** 2
        return -torch.autograd.grad(prior_mean, z, forward_score)[0]

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """Policy and prior at every state; back through the policy's parameters, and through both at `z_{k+1}`."""
        chosen, following, either = self.states(core, batch)
        return NFE(core.kernel.steps * len(batch), forward=2 * either, backward=chosen + 2 * following)


class NablaGFNNoFlow(NablaGFN):
    """The forward loss of residual ∇-DB alone, without the flow network: `g_φ = 0`.

    Its fixed point is not `p_# exp(βr)`.
    """

    Config = NablaConfig
    recipe = {"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4}
    config: NablaConfig

    def tilted(self) -> bool:
        """False."""
        return False

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """None."""
        return {}

    def transition_losses(self, core: Core, part: Transitions) -> tuple[dict[str, Tensor], Tensor]:
        """`w_k ‖(μ_θ − μ_#)(z_k) / σ_k² − β γ_{k+1} ∇_{z_{k+1}} r(decode(ẑ_θ(z_{k+1})))‖²`, and the trust region."""
        reward_score, rewards, _ = self.reward_score(core, part)
        forward_score, output = self.forward_score(core, part)
        losses = {"forward": self.weight(core, part.k, part.z) * mean_square(forward_score - reward_score)}
        return losses | self.trust_loss(part, output), rewards

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at every state, the prior at every `z_k`; back through the policy."""
        chosen, following, either = self.states(core, batch)
        return NFE(core.kernel.steps * len(batch), forward=either + chosen, backward=chosen + following)
