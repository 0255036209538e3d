"""Detailed balance with a scalar flow, which needs no reward gradients: DAG-DB, and its residual form."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from bench import (
    NFE,
    TILT,
    Batch,
    Config,
    Core,
    DiffusionModel,
    Loss,
    Method,
    Needs,
    Trajectory,
    Transitions,
    gaussian_log_prob,
)

from .scoring import predict_and_score, score_ends


class DBConfig(Config):
    """Options of detailed balance; symbols as in the docstring of `DB`."""

    reduction: Literal["mean", "sum"] = Field(
        "mean", description="of log-densities over elements; mean (published) makes β count d times"
    )
    trust: float = Field(1.0, ge=0, description="λ of ‖o_θ − o_old‖², mean over elements")
    fraction: float = Field(1.0, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the flow network f_φ")


@dataclass(frozen=True)
class Terms:
    """The terms of the balance of n transitions; float [n] unless said otherwise.

    flow, flow_next: `f(z_k)` and `f(z_{k+1})`. log_policy: `log p_θ(z_{k+1}|z_k)`. log_reference: what it is balanced
    against. output: the policy's, [n, *latent]. rewards: `r(x̂_k)` of all states that are known so far, [B, K+1].
    """

    part: Transitions
    output: Tensor
    flow: Tensor
    log_policy: Tensor
    log_reference: Tensor
    flow_next: Tensor
    rewards: Tensor


class DB(Method):
    """DAG-DB: detailed balance of the policy against the noising process, with a scalar flow.

    The loss of a transition is

        ( f(z_k) + log p_θ(z_{k+1}|z_k) − log p_B(z_k|z_{k+1}) − f(z_{k+1}) )² + λ ‖o_θ(z_k) − o_old(z_k)‖²,
        f(z_k) = f_φ(z_k) + β r(x̂_k),   f(z_K) = β r(z_K),

    where x̂_k is the policy's clean prediction at z_k, without guidance and without gradient, and f_φ the sum over the
    elements of a network's output. The target is exp(βr), without the prior; as the sampler's variances are fixed, no
    policy satisfies the equation exactly.

    Zhang et al., "Improving GFlowNets for Text-to-Image Diffusion Alignment", 2024, https://arxiv.org/abs/2406.00633
    """

    Config = DBConfig
    needs = Needs(density=True, memoryless=True, record=frozenset({"model_output"}))
    strength = TILT
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4, "train.beta_warmup": 0.5}
    config: DBConfig

    def __init__(self, config: DBConfig):
        super().__init__(config)
        if 0 < config.fraction < 1:  # then ends of some transitions are predicted apart
            self.needs = replace(self.needs, uneven=True)

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """The flow network f_φ, zero at the start."""
        return {"flow": model.latent_network(self.config.channels)}

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, S], on the CPU: the steps whose transitions are balanced; the last step comes first."""
        return core.choose_steps(data, self.config.fraction).flip(1)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions of every trajectory."""
        steps = self.steps(core, data)
        for terms in self.terms(core, data, steps, core.micro_batch):
            residual = terms.flow + terms.log_policy - terms.log_reference - terms.flow_next
            yield mean_over_steps({"balance": residual**2} | self.trust_loss(terms), steps)

    def trust_loss(self, terms: Terms) -> dict[str, Tensor]:
        """`λ ‖o_θ − o_old‖²` [n], mean over elements, under its name; nothing for λ = 0."""
        if not self.config.trust:
            return {}
        change = (terms.output - terms.part.model_output).square().flatten(1).mean(1)
        return {"trust": self.config.trust * change}

    def terms(
        self, core: Core, data: Trajectory, steps: Tensor, size: int, rewards: Tensor | None = None
    ) -> Iterator[Terms]:
        """The balance's terms of the transitions at `steps` [B, S], in micro-batches of at most `size` transitions.

        rewards: `r(x̂_k)` [B, K+1] of all the states, if an earlier pass has found them. Otherwise each state is scored
        here, once: with the prediction of the transition that begins there, which comes before the one that ends there
        because the last step comes first. Only an end where no chosen transition begins takes a prediction of its own.
        """
        scored = rewards is not None
        if rewards is None:
            rewards = score_ends(core, data, steps)
        for part in data.transitions(steps, size):
            if scored:
                output = core.predict(part.z, part.k, part.conditioning)
            else:
                output, predicted = predict_and_score(core, part)
                rewards = rewards.index_put((part.row, part.k), predicted.to(rewards.dtype))
            yield self.balance(core, part, output, rewards)

    def balance(self, core: Core, part: Transitions, output: Tensor, rewards: Tensor) -> Terms:
        """The terms for the policy's output at z_k [n, *latent] and the rewards `r(x̂_k)` [B, K+1]."""
        mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
        return Terms(
            part=part,
            output=output,
            flow=self.flow(core, part, part.z, part.k, rewards),
            log_policy=gaussian_log_prob(part.z_next, mean, std) / self.divisor(part),
            log_reference=self.log_reference(core, part) / self.divisor(part),
            flow_next=self.flow(core, part, part.z_next, part.k + 1, rewards),
            rewards=rewards,
        )

    def log_reference(self, core: Core, part: Transitions) -> Tensor:
        """`log p_B(z_k|z_{k+1})` [n], summed over elements."""
        return gaussian_log_prob(part.z, *core.kernel.noising(part.z_next, part.k))

    def flow(self, core: Core, part: Transitions, z: Tensor, k: Tensor, rewards: Tensor) -> Tensor:
        """`f(z_k)` [n]; there is no f_φ at the finished sample."""
        learned = core.network("flow", z, k, part.conditioning).flatten(1).sum(1)
        return learned.masked_fill(k == core.kernel.steps, 0) + core.beta * rewards[part.row, k]

    def divisor(self, part: Transitions) -> int:
        """What a sum of log-densities over elements is divided by."""
        return part.z[0].numel() if self.config.reduction == "mean" else 1

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at z_k, whose conditional half gives x̂_k; alone, that half at an end where none begins."""
        steps = self.steps(core, batch).tolist()
        transitions = sum(map(len, steps))
        ends = sum(len({k + 1 for k in chosen} - {core.kernel.steps, *chosen}) for chosen in steps)
        return NFE(core.kernel.steps * len(steps), forward=transitions, backward=transitions, unguided=ends)


def mean_over_steps(losses: dict[str, Tensor], steps: Tensor) -> Loss:
    """The micro-loss of n transitions from its parts by name, each [n]; steps: [B, S], of the whole update."""
    total: Any = sum(losses.values())
    return Loss(total / steps.shape[1], {name: value.detach() for name, value in losses.items()})


class ResDBConfig(DBConfig):
    """Options of residual detailed balance."""

    reduction: Literal["mean", "sum"] = Field("sum", description="of log-densities over elements; mean: another target")
    trust: float = Field(0.0, ge=0, description="λ of ‖o_θ − o_old‖², mean over elements")


class ResDB(DB):
    """Residual detailed balance against the prior, with a scalar flow; it samples from p_# exp(βr).

    The loss of a transition is, with the flow of `DB`,

        ( f(z_k) + log p_θ(z_{k+1}|z_k) − log p_#(z_{k+1}|z_k) − f(z_{k+1}) )²

    It differs from DAG-DB in that the prior's own transition takes the place of the noising process, and in that
    densities are summed over elements.
    """

    Config = ResDBConfig
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}

    def tilted(self) -> bool:
        """For summed densities: their mean makes β count d times."""
        return self.config.reduction == "sum"

    def log_reference(self, core: Core, part: Transitions) -> Tensor:
        """`log p_#(z_{k+1}|z_k)` [n], summed over elements."""
        output = core.predict(part.z, part.k, part.conditioning, prior=True)
        mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
        return gaussian_log_prob(part.z_next, mean, std)

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """As of `DB`, and the prior at z_k."""
        policy = super().nfe(core, batch)
        return NFE(policy.rollout, 2 * policy.forward, policy.backward, policy.unguided)
