"""Residual ∇-DB whose flow network learns from the lean adjoint of Adjoint Matching; this goes beyond the paper."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench import NFE, Batch, Core, Loss, Trajectory, Transitions, mean_square

from ..adjoint_matching import lean_adjoint
from .base import FlowConfig, NablaMethod


class NablaGFNAdjoint(NablaMethod):
    """Residual ∇-DB whose flow network regresses on the lean adjoint; a variant of ours.

    The lean adjoint of a sampled trajectory estimates the gradient of the residual flow, `∇ log F̃(z_k) = −a_k`:

        a_K = −β ∇ r(decode(z_K)),    a_k = (∂μ_#/∂z_k)ᵀ a_{k+1}.

    It carries the reward's gradient to every state at once. The reverse loss of `NablaGFN` learns it from the policy,
    one step further back with every regression. With `∇ log F̃` as there, `‖·‖²` the mean over elements and
    `w_k = σ_k²`, the losses of a transition are

        forward   w_k ‖(μ_θ − μ_#)(z_k) / σ_k² − sg[∇ log F̃(z_{k+1})]‖²
        reverse   w_k ‖a_k + ∇ log F̃(z_k)‖²
        terminal  ‖g_φ(z_K)‖²                                      if k + 1 = K
        trust     λ ‖o_θ(z_k) − o_old(z_k)‖²

    The adjoint is that of Domingo-Enrich et al., "Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models
    with Memoryless Stochastic Optimal Control", ICLR 2025, https://arxiv.org/abs/2409.08861.
    """

    Config = FlowConfig
    needs = replace(NablaMethod.needs, uneven=True)
    config: FlowConfig

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions, once the adjoint of every trajectory is known."""
        steps = self.steps(core, data)
        adjoint, prior_mean, _ = lean_adjoint(core, data, steps.min(1).values)
        for part in data.transitions(steps, core.micro_batch):
            at_k = part.row, part.k
            yield self.micro_loss(part, steps, *self.transition_losses(core, part, adjoint[at_k], prior_mean[at_k]))

    def transition_losses(  # type: ignore[override]  # the adjoint is made for a whole trajectory, in `losses`
        self, core: Core, part: Transitions, adjoint: Tensor, prior_mean: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses above, given `a_k` and `μ_#(z_k)`, each [n, *latent]."""
        k, inner, kernel = part.k, part.unfinished, core.kernel
        next_reward_score, rewards, _ = self.reward_score(core, part)
        z = part.z.detach().requires_grad_()
        output = core.predict(z, k, part.conditioning)
        forward_score = (kernel.mean(z, output, k) - prior_mean) / kernel.std(k, z) ** 2
        clean = kernel.clean(z, output, k)
        gradient = core.beta * self.gamma(core, k, z) * core.reward_gradient(clean, part.prompts)[1]
        reward_score = torch.autograd.grad(clean, z, gradient, retain_graph=True)[0]
        flow, next_flow = self.flows(core, part)
        reverse_residual = adjoint + reward_score + flow
        forward_residual = forward_score - next_reward_score.index_add(0, inner, next_flow[inner].detach())
        weight = self.weight(core, k, part.z)
        losses = {
            "reverse": self.config.reverse_weight * weight * mean_square(reverse_residual),
            "terminal": self.terminal_loss(part, next_flow),
            "forward": weight * mean_square(forward_residual),
        }
        return losses | self.trust_loss(part, output), rewards

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at every state, backward to parameters and states; the prior from the first chosen step on."""
        chosen, _, either = self.states(core, batch)
        prior = sum(core.kernel.steps - min(steps) for steps in self.steps(core, batch).tolist())
        return NFE(core.kernel.steps * len(batch), forward=either + prior, backward=chosen + either + prior)
