"""What all policy gradients share: the sum over transitions, the KL term, advantages within a group."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from bench import (
    NFE,
    Batch,
    Config,
    Core,
    Deviation,
    Loss,
    Method,
    Needs,
    Strength,
    Trajectory,
    Transitions,
    gaussian_log_prob,
    group_advantages,
    mean_square,
)

from .surrogate import Surrogate, gaussian_kl

AdvantageClip = Annotated[float | None, Field(gt=0, description="largest absolute advantage; null: any")]
Clip = Annotated[float, Field(gt=0, description="half-width of the ratio's clip range")]
KLWeight = Annotated[float, Field(ge=0, description="weight of the KL to the prior; 0: no such term")]


class PolicyGradientConfig(Config):
    """Options of every policy gradient."""

    advantage_clip: AdvantageClip = 5.0
    kl: KLWeight = 0.0


class PolicyGradient(Method):
    """Policy gradient on the transitions z_k → z_{k+1} of the sampling chain.

        L(θ) = E[ mean over k of  ℓ(ρ_k, A) + w KL_k ],   ρ_k = p_θ(z_{k+1} | z_k) / p_old(z_{k+1} | z_k)

    A is the advantage of the finished sample, p_old the policy that sampled it, and KL_k the divergence of the policy's
    step from the prior's at the sampled z_k. A subclass says what A and ℓ are, and which steps k train.
    """

    recipe: ClassVar[dict[str, Any]] = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    strength: ClassVar[Strength | None] = Strength("method.kl", (0.0, 0.04, 0.2, 1.0))
    config: PolicyGradientConfig

    @abstractmethod
    def advantages(self, core: Core, data: Trajectory) -> Tensor:
        """A [B] of a whole round, before it is clipped."""

    @abstractmethod
    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, S], on the CPU: the steps of each trajectory that train."""

    @abstractmethod
    def surrogate(self, core: Core, part: Transitions, mean: Tensor) -> Surrogate:
        """ℓ(ρ_k, A) [n] and what is logged of it. mean: the policy's μ_θ(z_k), [n, *latent]."""

    def kl(self, core: Core, part: Transitions, mean: Tensor, prior_mean: Tensor) -> Tensor:
        """KL_k [n]: `‖μ_θ − μ_#‖² / 2σ²`, a mean over elements."""
        return gaussian_kl(mean, prior_mean, core.kernel.std(part.k, part.z).flatten())

    def anchor(self, core: Core, part: Transitions) -> Tensor:
        """The output [n, *latent] of what KL_k is the divergence from: the prior's."""
        return core.predict(part.z, part.k, part.conditioning, prior=True)

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add clipped advantages [B] to the round."""
        advantages, limit = self.advantages(core, data), self.config.advantage_clip
        return replace(data, advantages=advantages if limit is None else advantages.clamp(-limit, limit))

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the transitions."""
        steps = self.steps(core, data)
        for part in data.transitions(steps, core.micro_batch):
            loss, metrics = self.transition_losses(core, part)
            yield Loss(loss / steps.shape[1], metrics)

    def transition_losses(self, core: Core, part: Transitions) -> Surrogate:
        """`ℓ(ρ_k, A) + w KL_k` [n], and what is logged of it."""
        mean = core.kernel.mean(part.z, core.predict(part.z, part.k, part.conditioning), part.k)
        loss, metrics = self.surrogate(core, part, mean)
        if self.config.kl:
            kl = self.kl(core, part, mean, core.kernel.mean(part.z, self.anchor(core, part), part.k))
            loss = loss + self.config.kl * kl
            metrics["kl"] = kl.detach()
        return loss, metrics

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy at every chosen state, and the prior for a KL term; the rollout has recorded p_old."""
        transitions = self.steps(core, batch).numel()
        forward = transitions * (2 if self.config.kl else 1)
        return NFE(rollout=core.kernel.steps * len(batch), forward=forward, backward=transitions)


ONLY_STEP = (
    "its only step is the last, which is left out: use sampler.steps ≥ 2, or method.train_last=true if it has that"
)


class GroupPolicyGradientConfig(PolicyGradientConfig):
    """Options of a policy gradient within groups."""

    deviation: Deviation = Deviation()


class GroupPolicyGradient(PolicyGradient):
    """Policy gradient with `A = (r − the mean of its group) / deviation`; a group is a prompt's samples of a round."""

    config: GroupPolicyGradientConfig

    def advantages(self, core: Core, data: Trajectory) -> Tensor:
        """A [B]; `method.deviation` says what the centred reward is divided by."""
        return group_advantages(core, data, self.config.deviation)

    def combines(self) -> tuple[str, ...]:
        """Terms may be normalised apart, with or without GDPO: rewards enter as advantages alone."""
        return ("advantages", "gdpo")

    def unfit(self, steps: int, group: int) -> str | None:
        """In a group of one every advantage is 0."""
        return "advantages within a prompt's group need train.samples_per_prompt ≥ 2" if group < 2 else None


class FlowPolicyGradientConfig(GroupPolicyGradientConfig):
    """Options of a policy gradient within groups that trains random steps."""

    fraction: float = Field(1.0, gt=0, le=1, description="transitions used, over K")
    train_last: bool = Field(False, description="whether the last step trains; the published codes leave it out")


class FlowPolicyGradient(GroupPolicyGradient):
    """Policy gradient within groups, as published for flow models; it runs on diffusion models too.

    μ_old comes from the recorded output, so that ρ is 1, to rounding, at the policy that sampled. The published codes
    detach the unconditional half of a guided prediction; here it is differentiated, as for every method.
    """

    needs = Needs(rewards=True, density=True, record=frozenset({"model_output"}))
    config: FlowPolicyGradientConfig

    def unfit(self, steps: int, group: int) -> str | None:
        """Where the last step is left out there must be another."""
        return ONLY_STEP if steps == 1 and not self.config.train_last else super().unfit(steps, group)

    def steps(self, core: Core, data: Batch) -> Tensor:
        """One random step of each of `⌊K · fraction⌋` equal bins, which leave out the last step."""
        return core.choose_steps(data, self.config.fraction, last="always" if self.config.train_last else "never")


def old_policy(core: Core, part: Transitions) -> tuple[Tensor, Tensor]:
    """Mean μ_old [n, *latent] of the policy that sampled, from its recorded output, and the steps' σ [n]."""
    return core.kernel.mean(part.z, part.model_output, part.k), core.kernel.std(part.k, part.z).flatten()


def kl_by_rate(core: Core, part: Transitions, mean: Tensor, other_mean: Tensor) -> Tensor:
    """`‖μ_θ − μ‖² / 2g_k²` [n], a mean over elements; `g_k² = σ_k² / (s_k − s_{k+1})` is the rate of the noise."""
    rate = (core.kernel.std(part.k, part.z) ** 2 / core.kernel.noise_decrease(part.k, part.z)).flatten()
    return mean_square(mean - other_mean) / (2 * rate)


def mean_log_ratio(core: Core, part: Transitions, mean: Tensor) -> Tensor:
    """`(log p_θ(z_{k+1} | z_k) − log p_old(z_{k+1} | z_k)) / d` [n], by the log-density that the rollout recorded."""
    log_prob = gaussian_log_prob(part.z_next, mean, core.kernel.std(part.k, part.z))
    return (log_prob - part.log_prob) / mean[0].numel()
