"""What the regressions on the forward process share: noised samples, the networks compared there, advantages."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

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
    Noised,
    Trajectory,
    group_advantages,
    mean_square,
)


class RegressionConfig(Config):
    """Options of every regression on the forward process."""

    fraction: float = Field(0.3, gt=0, le=1, description="noise levels per sample and update, over K")


class AdvantageConfig(RegressionConfig):
    """Options of those that see rewards as normalised advantages."""

    deviation: Deviation = Deviation(over="round", correction=0, epsilon=1e-4)
    advantage_clip: float = Field(5.0, gt=0, description="largest absolute advantage, in deviations")


class ForwardProcess(Method):
    """A loss in the network's output o at `z = αx + sε`, where x is a finished sample and ε new noise.

    u is the output that would give x back: ε, `αε − sx` or `ε − x`, by what the model predicts. Only x enters, so
    samples may come from any sampler, also from one without noise.
    """

    Config = RegressionConfig
    needs = Needs(rewards=True)
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    config: RegressionConfig
    references: ClassVar[tuple[str, ...]]  # whose outputs the loss names besides the policy's: "prior", or copies

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The sampler's steps [B, S] whose noise levels the samples get."""
        return core.choose_steps(data, self.config.fraction, last="like any")

    def reference_outputs(self, core: Core, part: Noised) -> dict[str, Tensor]:
        """The outputs [n, *latent] of `references`, without gradient."""
        return {name: predict(core, part, name) for name in self.references}

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """At every noised sample the policy and each reference; the policy alone has a gradient."""
        states = self.steps(core, batch).numel()
        return NFE(core.kernel.steps * len(batch), (1 + len(self.references)) * states, states)


class Regression(ForwardProcess):
    """A loss that is a mean over noised samples."""

    @abstractmethod
    def loss(
        self, core: Core, part: Noised, policy: Tensor, reference: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at each noised sample [n], and what is logged of it [n].

        policy: o_θ [n, *latent]. reference: the outputs of `references`, alike and without gradient.
        """

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over noised samples."""
        steps = self.steps(core, data)
        for part in core.noised(data, steps, core.micro_batch):
            policy, reference = core.predict(part.z, part.k, part.conditioning), self.reference_outputs(core, part)
            values, metrics = self.loss(core, part, policy, reference)
            yield Loss(values / steps.shape[1], metrics | distances(policy, reference))


class AdvantageRegression(Regression):
    """A regression that sees rewards as clipped advantages, `clip(A, ±c)/c` unless a subclass says otherwise."""

    config: AdvantageConfig

    def combines(self) -> tuple[str, ...]:
        """Terms may be normalised apart, with or without GDPO: rewards enter as advantages alone."""
        return ("advantages", "gdpo")

    def unfit(self, steps: int, group: int) -> str | None:
        """In a group of one every advantage is 0."""
        return "advantages within a prompt's group need train.samples_per_prompt ≥ 2" if group < 2 else None

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Add `clip(A, ±c)/c` [B] to the round."""
        return replace(data, advantages=clipped_advantages(core, data, self.config) / self.config.advantage_clip)


def predict(core: Core, part: Noised, name: str) -> Tensor:
    """The output [n, *latent] of the prior or of a copy of the adapters, without gradient."""
    if name == "prior":
        return core.predict(part.z, part.k, part.conditioning, prior=True)
    return core.predict(part.z, part.k, part.conditioning, weights=name)


def distances(policy: Tensor, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """`‖o_θ − o‖²` [n] for every reference, for the log."""
    return {f"distance/{name}": mean_square(policy.detach() - output) for name, output in reference.items()}


def clipped_advantages(core: Core, data: Trajectory, config: AdvantageConfig) -> Tensor:
    """Rewards less their prompt's mean over a deviation, clipped; [B]."""
    return group_advantages(core, data, config.deviation).clamp(-config.advantage_clip, config.advantage_clip)


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """Values [n], shaped to multiply the rows of latents `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))
