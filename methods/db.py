"""Detailed balance without reward gradients.

DAG-DB and DAG-KL: Zhang et al., "Improving GFlowNets for Text-to-Image Diffusion Alignment", 2024 (arXiv 2406.00633).
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import (
    Config,
    Core,
    DiffusionModel,
    Loss,
    Method,
    Needs,
    Trajectory,
    Transitions,
    gaussian_log_prob,
    leave_one_out,
)


class DBConfig(Config):
    """Options of detailed balance; symbols as in the class docstring."""

    residual: bool = Field(False, description="balance against the prior p_# (target p_# exp(βr)) instead of p_B")
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="of log-probabilities over elements; mean (published) makes β count d times"
    )
    clip: float | None = Field(None, gt=0, description="DAG-KL: half-width of the ratio's clip range; null: DAG-DB")
    advantage_clip: float = Field(5.0, gt=0, description="DAG-KL: largest absolute advantage")
    policy_weight: float = Field(1.0, gt=0, description="DAG-KL: weight of the policy gradient")
    trust: float = Field(1.0, ge=0, description="λ of ‖o_θ − o_old‖², mean over elements")
    fraction: float = Field(1.0, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the flow network f_φ")


class DB(Method):
    """Detailed balance with a forward-looking scalar flow, `f(z_k) = f_φ(z_k) + βr(x̂_k)` and `f(z_K) = βr(x)`.

    - `db`: `(f(z_k) + log p_θ(z_{k+1}|z_k) − log p_B(z_k|z_{k+1}) − f(z_{k+1}))²`, DAG-DB. The target is `exp(βr)`;
      with the sampler's fixed variances no policy satisfies it exactly.
    - `res_db`: `log p_#(z_{k+1}|z_k)` in the place of `log p_B`, densities summed: the target is `p_# exp(βr)`.
    - `dag_kl`: the flow learns by the same loss with `log p_θ` detached; the policy by a clipped policy gradient with
      the advantage `f(z_{k+1}) + log p_B − log p_θ − f(z_k)`, normalised by the others' mean and deviation.

    `x̂` is the clean prediction without guidance or gradient. f_φ is the sum over elements of a network on latents.
    """

    Config = DBConfig
    needs = Needs(
        density=True, record=frozenset({"model_output", "log_prob"}), whole_update=True
    )  # DAG-KL's advantages
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4, "train.beta_warmup": 0.5}
    config: DBConfig

    def tilted(self) -> bool:
        """Residual detailed balance of summed densities."""
        return self.config.residual and self.config.reduction == "sum" and not self.config.clip

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """The flow network, zero at the start."""
        return {"flow": model.latent_network(self.config.channels)}

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over transitions, the last first, so that `βr(x̂)` where one ends is known before it.

        DAG-KL's advantages are normalised over all trajectories of a step, or of its bin. Where a micro-batch does not
        hold these, a pass over the whole update comes first.
        """
        steps, rows, size = core.choose_steps(data, self.config.fraction).flip(1), len(data), core.micro_batch
        chosen = torch.zeros(rows, core.kernel.steps + 1, dtype=torch.bool).scatter_(1, steps, True)
        known = core.beta * core.look_ahead(data, chosen.scatter(1, steps + 1, True) & ~chosen)
        advantages = None
        if self.config.clip and rows <= size:
            size = size // rows * rows
        elif self.config.clip:
            with torch.no_grad():
                parts = data.transitions(steps, size)
                balances = [self.balance(core, part, self.predict(core, part, known), known)[0] for part in parts]
            advantages = self.advantages(torch.cat(balances), rows).split(size)
        for place, part in enumerate(data.transitions(steps, size)):
            output = core.predict(part.z, part.k, part.conditioning) if advantages else self.predict(core, part, known)
            balance, log_prob = self.balance(core, part, output, known)
            own = None
            if self.config.clip:
                own = advantages[place] if advantages else self.advantages(balance.detach(), rows)
            values, metrics = self.transition_losses(part, output, balance, log_prob, own)
            yield Loss(values / steps.shape[1], metrics)

    def predict(self, core: Core, part: Transitions, known: Tensor) -> Tensor:
        """`o_θ(z_k)` [n, *latent]; puts `βr(x̂_k)` into its places of `known` [B, K+1]."""
        output, rewards = core.predict_and_score(part)
        known[part.row, part.k] = core.beta * rewards
        return output

    def balance(self, core: Core, part: Transitions, output: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The equation's left side minus its right side [n], and `log p_θ` [n] under the reduction."""
        mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
        log_prob = gaussian_log_prob(part.z_next, mean, std) / self.scale(part)
        if self.config.residual:
            prior_output = core.predict(part.z, part.k, part.conditioning, prior=True)
            other = gaussian_log_prob(part.z_next, core.kernel.mean(part.z, prior_output, part.k), std)
        else:
            other = gaussian_log_prob(part.z, *core.kernel.noising(part.z_next, part.k))
        flow = self.flow(core, part, part.z, part.k, known)
        flow_next = self.flow(core, part, part.z_next, part.k + 1, known)
        used = log_prob.detach() if self.config.clip else log_prob
        return flow + used - other / self.scale(part) - flow_next, log_prob

    def advantages(self, balances: Tensor, rows: int) -> Tensor:
        """DAG-KL's advantages [n] of detached balances [n], whole steps of `rows` trajectories each."""
        table = leave_one_out(-balances.view(-1, rows).T)
        return table.clamp(-self.config.advantage_clip, self.config.advantage_clip).T.flatten()

    def transition_losses(
        self, part: Transitions, output: Tensor, balance: Tensor, log_prob: Tensor, advantages: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each transition [n], and its parts; advantages: [n], of DAG-KL."""
        losses = {"balance": balance**2}
        if advantages is not None:
            ratio = torch.exp(log_prob - part.log_prob / self.scale(part))
            clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
            losses["policy"] = -self.config.policy_weight * torch.minimum(advantages * ratio, advantages * clipped)
        if self.config.trust:
            losses["trust"] = self.config.trust * (output - part.model_output).square().flatten(1).mean(1)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    def flow(self, core: Core, part: Transitions, z: Tensor, k: Tensor, known: Tensor) -> Tensor:
        """`f(z_k)` [n]; known: `βr(x̂)` [B, K+1]."""
        own = core.network("flow", z, k, part.conditioning).flatten(1).sum(1)
        return own.masked_fill(k == core.kernel.steps, 0) + known[part.row, k]

    def scale(self, part: Transitions) -> int:
        """Divisor of log-densities."""
        return part.z[0].numel() if self.config.reduction == "mean" else 1
