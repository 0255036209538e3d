"""∇-DB and residual ∇-DB as published, with the reverse loss at the first state of every sampled transition.

Liu et al., "Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets", ICLR 2025,
https://arxiv.org/abs/2412.07775.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench import NFE, Batch, Core, Transitions, mean_square

from .base import FlowConfig, NablaMethod


class NablaDBConfig(FlowConfig):
    """Options of plain ∇-DB."""

    detach_target: bool = Field(True, description="keep the forward loss's gradient out of g_φ")


class NablaDB(NablaMethod):
    """Plain ∇-DB: aims at `exp(βr)`; the prior is only where training starts.

    Detailed balance `p_θ(z_{k+1}|z_k) F(z_k) = q F(z_{k+1})` against the noising kernel `q = p_B(z_k|z_{k+1})`,
    differentiated in each state. With `∇ log F` parameterised as `∇ log F̃` in `NablaGFN`, `‖·‖²` the mean over elements
    and `w_k = σ_k²`, the losses of a transition are

        forward   w_k ‖∇_{z_{k+1}} log p_θ/q − sg[∇ log F(z_{k+1})]‖²
        reverse   w_k ‖sg[∇_{z_k} log p_θ/q] + ∇ log F(z_k)‖²
        terminal  ‖g_φ(z_K)‖²                                      if k + 1 = K
        trust     λ ‖o_θ(z_k) − o_old(z_k)‖²

    The forward loss trains the policy (and `g_φ` with `detach_target: false`), reverse and terminal loss train `g_φ`.
    """

    Config = NablaDBConfig
    config: NablaDBConfig

    def tilted(self) -> bool:
        """False: the target `exp(βr)` has no prior."""
        return False

    def transition_losses(self, core: Core, part: Transitions) -> tuple[dict[str, Tensor], Tensor]:
        """The losses above. The graphs of reward and reference are freed before the policy's is built."""
        inner, variance = part.unfinished, core.kernel.std(part.k, part.z) ** 2
        next_reward_score, rewards, _ = self.reward_score(core, part)
        reference_forward, reference_reverse = self.reference_scores(core, part, variance)
        z = part.z.detach().requires_grad_()
        output = core.predict(z, part.k, part.conditioning)
        mean = core.kernel.mean(z, output, part.k)
        forward_score = (mean - part.z_next) / variance - reference_forward
        reverse_score = self.policy_scores(core, part, z, output, mean, variance) - reference_reverse
        flow, next_flow = self.flows(core, part)
        reverse_residual = reverse_score + flow
        target_flow = next_flow[inner].detach() if self.config.detach_target else next_flow[inner]
        forward_residual = forward_score - next_reward_score.index_add(0, inner, target_flow)
        weight = self.weight(core, part.k, part.z)
        losses = {
            "reverse": self.config.reverse_weight * weight * mean_square(reverse_residual),
            "terminal": self.terminal_loss(part, next_flow),
            "forward": weight * mean_square(forward_residual),
        }
        return losses | self.trust_loss(part, output), rewards

    def policy_scores(
        self, core: Core, part: Transitions, z: Tensor, output: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        """`∇_{z_k} log p_θ(z_{k+1}|z_k) + β γ_k ∇_{z_k} r(decode(ẑ_θ(z_k)))` [n, *latent], detached.

        One backward pass for both, through the graph from `z` to `output` and `mean = μ_θ(z)`, which is kept.
        """
        clean = core.kernel.clean(z, output, part.k)
        _, gradient = core.reward_gradient(clean, part.prompts)
        gradient = core.beta * self.gamma(core, part.k, z) * gradient
        score = (part.z_next - mean.detach()) / variance
        return torch.autograd.grad([clean, mean], z, [gradient, score], retain_graph=True)[0]

    def reference_scores(self, core: Core, part: Transitions, variance: Tensor) -> tuple[Tensor, Tensor]:
        """`∇_{z_{k+1}}` and `∇_{z_k}` of `log p_B(z_k|z_{k+1})`, each [n, *latent], detached."""
        noised, std = core.kernel.noising(part.z_next, part.k)
        jacobian = core.kernel.noising(torch.ones_like(part.z_next), part.k)[0]  # of the linear map z_{k+1} → noised
        return jacobian * (part.z - noised) / std**2, -(part.z - noised) / std**2

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at every state; backward to the parameters, to `z_k` and to `z_{k+1}`."""
        chosen, following, either = self.states(core, batch)
        return NFE(core.kernel.steps * len(batch), forward=either, backward=2 * chosen + following)


class NablaGFNPublishedConfig(NablaDBConfig):
    """The choices of the authors' code."""

    weighting: Literal["score", "kl"] = Field("score", description="w_k of the transition losses: σ_k² ('kl') or 1")
    detach_target: bool = Field(False, description="keep the forward loss's gradient out of g_φ")
    trust: float = Field(1e3, ge=0, description="λ of the trust region; 0: none")


class NablaGFNPublished(NablaDB):
    """Residual ∇-DB with the choices of the authors' code: samples from `p_# exp(βr)`.

    The losses of `NablaDB` with the prior as the reference, `q = p_#(z_{k+1}|z_k)`, and `w_k = 1`. The forward loss
    trains `g_φ` too. Trajectories are one round old; the trust region holds the policy near the one that sampled them.
    """

    Config = NablaGFNPublishedConfig
    recipe = NablaMethod.recipe | {"train.data_lag": 1}

    def tilted(self) -> bool:
        """True."""
        return True

    def reference_scores(self, core: Core, part: Transitions, variance: Tensor) -> tuple[Tensor, Tensor]:
        """`∇_{z_{k+1}}` and `∇_{z_k}` of `log p_#(z_{k+1}|z_k)`, each [n, *latent], detached."""
        z = part.z.detach().requires_grad_()
        prior_mean = core.kernel.mean(z, core.predict(z, part.k, part.conditioning, prior=True), part.k)
        score = (part.z_next - prior_mean.detach()) / variance
        return -score, torch.autograd.grad(prior_mean, z, score)[0]

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """Those of `NablaDB`, and the prior at every `z_k`, forward and backward."""
        chosen, following, either = self.states(core, batch)
        return NFE(core.kernel.steps * len(batch), forward=either + chosen, backward=3 * chosen + following)
