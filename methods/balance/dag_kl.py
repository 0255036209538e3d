"""DAG-KL: detailed balance as a policy gradient."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bench import Core, Loss, Needs, Trajectory, leave_one_out, two_passes

from .db import DB, DBConfig, Terms, mean_over_steps


class DAGKLConfig(DBConfig):
    """Options of DAG-KL; symbols as in the docstring of `DAGKL`."""

    clip: float = Field(1e-4, gt=0, description="half-width of the ratio's clip range")
    advantage_clip: float = Field(5.0, gt=0, description="largest absolute advantage")
    policy_weight: float = Field(1.0, gt=0, description="weight of the policy gradient")


class Recorded(NamedTuple):
    """What is recorded of a micro-batch: `δ` [n], and `r(x̂_k)` [B, K+1] of all states scored so far."""

    residual: Tensor
    rewards: Tensor


class DAGKL(DB):
    """DAG-KL: policy gradient on the advantages of a scalar flow against the noising process.

    The flow f of `DB` learns by the balance of DAG-DB with `log p_θ` detached, the policy by a clipped policy gradient:

        δ = f(z_k) + log p_θ(z_{k+1}|z_k) − log p_B(z_k|z_{k+1}) − f(z_{k+1}),
        δ² − w min( ρ A, clip(ρ, 1 ± ε) A ) + λ ‖o_θ(z_k) − o_old(z_k)‖²,
        ρ = p_θ(z_{k+1}|z_k) / p_old(z_{k+1}|z_k)

    A is −δ, detached and normalised by the mean and the deviation of the update's other trajectories at the same step
    (with `fraction` < 1 in the same bin of steps).
    If a micro-batch does not hold them all, a pass without gradient over the whole update comes first.

    Zhang et al., "Improving GFlowNets for Text-to-Image Diffusion Alignment", 2024, https://arxiv.org/abs/2406.00633
    """

    Config = DAGKLConfig
    needs = Needs(density=True, memoryless=True, record=frozenset({"model_output", "log_prob"}), whole_update=True)
    config: DAGKLConfig

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions of every trajectory."""
        steps, count = self.steps(core, data), len(data)
        whole_steps = count <= core.micro_batch
        size = core.micro_batch // count * count if whole_steps else core.micro_batch

        def residuals(first: list[Recorded] | None) -> Iterator[tuple[tuple[Terms, Tensor], Recorded]]:
            rewards = first[-1].rewards if first else None
            for terms in self.terms(core, data, steps, size, rewards):
                residual = terms.flow + terms.log_policy.detach() - terms.log_reference - terms.flow_next
                yield (terms, residual), Recorded(residual.detach(), terms.rewards)

        def advantages(recorded: list[Recorded]) -> Sequence[Tensor]:
            residuals = [part.residual for part in recorded]
            return self.advantages(torch.cat(residuals), count).split([len(residual) for residual in residuals])

        for (terms, residual), advantage in two_passes(residuals, advantages, complete=whole_steps):
            ratio = torch.exp(terms.log_policy - terms.part.log_prob / self.divisor(terms.part))
            clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
            policy = -self.config.policy_weight * torch.minimum(advantage * ratio, advantage * clipped)
            yield mean_over_steps({"balance": residual**2, "policy": policy} | self.trust_loss(terms), steps)

    def advantages(self, residuals: Tensor, count: int) -> Tensor:
        """A [n] of residuals δ [n], which are those of `count` trajectories at one step after another."""
        largest = self.config.advantage_clip
        return leave_one_out(-residuals.view(-1, count).T).clamp(-largest, largest).T.flatten()
