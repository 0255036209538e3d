"""Residual ∇-DB, the default of the ∇-GFlowNet family, and the same without its flow network."""

import torch
from torch import Tensor, nn

from bench import NFE, Batch, Core, DiffusionModel, Transitions, mean_square

from .base import FlowConfig, NablaConfig, NablaMethod, scatter


class NablaGFN(NablaMethod):
    """Residual ∇-DB (∇-GFlowNet): samples from `p_# exp(βr)`, with the reverse loss in expectation.

    The residual flow is the prior's expected reward from a state on, `F̃(z_k) = E_#[exp(β r) | z_k]`. Its gradient is
    the reward's gradient at the clean prediction plus a network `g_φ`:

        ∇ log F̃(z_k) = β γ_k sg[∇_{z_k} r(decode(ẑ_θ(z_k)))] + g_φ(z_k),    ∇ log F̃(z_K) = β ∇ r(decode(z_K)).

    Detailed balance of policy, prior and `F̃`, differentiated in each state of a transition `z_k → z_{k+1}`, is

        ∇_{z_{k+1}} log (p_θ/p_#)(z_{k+1}|z_k) = (μ_θ − μ_#)(z_k) / σ_k² = ∇ log F̃(z_{k+1}),        (forward)
        ∇_{z_k} log (p_θ/p_#)(z_{k+1}|z_k) = −∇ log F̃(z_k).                                          (reverse)

    The left side of (reverse) has the mean `−(∂μ_#/∂z_k)ᵀ (μ_θ − μ_#)(z_k) / σ_k²` over `z_{k+1} ~ p_θ(·|z_k)`. This
    depends on one state only, so we take it one step later, at `z_{k+1}`, where (forward) has already computed the
    policy's prediction and the reward's gradient. With `‖·‖²` the mean over elements and `w_k = σ_k²`, the losses are

        forward   w_k ‖(μ_θ − μ_#)(z_k) / σ_k² − sg[∇ log F̃(z_{k+1})]‖²
        reverse   w_{k+1} ‖∇ log F̃(z_{k+1}) − sg[(∂μ_#/∂z)ᵀ (μ_θ − μ_#)(z_{k+1}) / σ_{k+1}²]‖²      if k + 1 < K
        terminal  ‖g_φ(z_K)‖²                                                                      if k + 1 = K
        trust     λ ‖o_θ(z_k) − o_old(z_k)‖²

    The forward loss trains the policy, reverse and terminal loss train `g_φ`. The trust region is off by default.

    Liu et al., "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", ICLR 2025,
    https://arxiv.org/abs/2412.07775; `nabla_gfn_published` makes the paper's own choices.
    """

    Config = FlowConfig
    config: FlowConfig

    def transition_losses(self, core: Core, part: Transitions) -> tuple[dict[str, Tensor], Tensor]:
        """The losses above. The graphs of the passes at `z_{k+1}` are freed before the policy's at `z_k` is built."""
        inner = part.unfinished
        reward_score, rewards, next_mean = self.reward_score(core, part)
        reverse_score = self.reverse_score(core, part, next_mean)
        forward_score, output = self.forward_score(core, part)
        flow = core.network("flow", part.z_next, part.k + 1, part.conditioning)
        flow_target = -(reward_score[inner] + reverse_score)
        reverse_loss = self.weight(core, part.k[inner] + 1, flow) * mean_square(flow[inner] - flow_target)
        forward_target = reward_score.index_add(0, inner, flow[inner].detach())  # at z_K the reward's score alone
        losses = {
            "reverse": self.config.reverse_weight * scatter(reverse_loss, inner, len(part)),
            "terminal": self.terminal_loss(part, flow),
            "forward": self.weight(core, part.k, part.z) * mean_square(forward_score - forward_target),
        }
        return losses | self.trust_loss(part, output), rewards

    def forward_score(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor]:
        """`(μ_θ − μ_#)(z_k) / σ_k²` and the output `o_θ(z_k)`, each [n, *latent]."""
        z, k, mean = part.z, part.k, core.kernel.mean
        with torch.no_grad():
            prior_mean = mean(z, core.predict(z, k, part.conditioning, prior=True), k)
        output = core.predict(z, k, part.conditioning)
        return (mean(z, output, k) - prior_mean) / core.kernel.std(k, z) ** 2, output

    def reverse_score(self, core: Core, part: Transitions, policy_mean: Tensor) -> Tensor:
        """`−(∂μ_#/∂z)ᵀ (μ_θ − μ_#) / σ²` at the `z_{k+1}` with k + 1 < K [m, *latent], detached, given `μ_θ` there."""
        inner = part.unfinished
        if not len(inner):
            return policy_mean  # empty too
        z, k = part.z_next[inner].requires_grad_(), part.k[inner] + 1
        prior_mean = core.kernel.mean(z, core.predict(z, k, part.conditioning[inner], prior=True), k)
        forward_score = (policy_mean - prior_mean.detach()) / core.kernel.std(k, z) ** 2
        return -torch.autograd.grad(prior_mean, z, forward_score)[0]

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """Policy and prior at every state; backward for the parameters at `z_k`, and to `z_{k+1}` through both."""
        chosen, following, either = self.states(core, batch)
        return NFE(core.kernel.steps * len(batch), forward=2 * either, backward=chosen + 2 * following)


class NablaGFNNoFlow(NablaGFN):
    """Residual ∇-DB's forward loss alone, without the flow network (`g_φ = 0`); its optimum is not `p_# exp(βr)`."""

    Config = NablaConfig  # type: ignore[assignment]  # the flow network's options are left out
    recipe = {"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4}
    config: NablaConfig  # type: ignore[assignment]

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
        """The policy at every state and the prior at every `z_k`; backward through the policy."""
        chosen, following, either = self.states(core, batch)
        return NFE(core.kernel.steps * len(batch), forward=either + chosen, backward=chosen + following)
