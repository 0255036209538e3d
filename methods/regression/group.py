"""Regressions on the forward process whose loss compares the samples of a prompt with one another."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from bench import Batch, Core, Loss, Needs, Noised, Trajectory, group_mean, two_passes

from ..balance.softmax import pack_groups
from .forward_process import AdvantageConfig, ForwardProcess, distances

Rows = TypeVar("Rows", bound=Batch)
Evaluated = tuple[Noised, Tensor, dict[str, Tensor], Tensor]  # noised samples, o_θ, the references' outputs, q


class Compared(NamedTuple):
    """What is kept of n noised samples: their groups, q [n] without gradient, and the references' outputs."""

    groups: list[tuple[str, int]]
    q: Tensor
    reference: dict[str, Tensor]


class GroupRegression(ForwardProcess):
    """A loss in a quantity q of each noised sample and in q's mean over the group, which has no gradient.

    A group is one update's samples of a prompt at one noise level, which all of them get. If a micro-batch does not
    hold whole groups, a pass without gradient over all noised samples comes first, which gives the means.
    """

    needs = Needs(rewards=True, whole_update=True)
    config: AdvantageConfig
    shared_noise: ClassVar[bool]  # whether the samples of a prompt get one noise too

    @abstractmethod
    def compared(self, part: Noised, policy: Tensor, reference: dict[str, Tensor]) -> Tensor:
        """q [n], for o_θ [n, *latent] and the outputs of `references`."""

    @abstractmethod
    def loss(
        self, part: Noised, policy: Tensor, reference: dict[str, Tensor], q: Tensor, mean: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each noised sample [n], and what is logged of it [n]; mean: of q over its group, [n]."""

    def combines(self) -> tuple[str, ...]:
        """Terms may be normalised apart, with or without GDPO: rewards enter as advantages alone."""
        return ("advantages", "gdpo")

    def unfit(self, steps: int, group: int) -> str | None:
        """A group of one is compared with nothing."""
        why = "one update's samples of a prompt are compared: train.samples_per_prompt > train.updates_per_round"
        return why if group < 2 else None

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The sampler's steps [B, S] whose noise levels the samples get; the same for all of a prompt."""
        return super().steps(core, by_group(data))

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over noised samples, of whole groups where they fit."""
        steps, named = self.steps(core, data), by_group(data) if self.shared_noise else data
        size = max(1, core.micro_batch // steps.shape[1])
        parts = pack_groups(data.prompts, size)
        whole_groups = max(map(len, parts)) <= size
        if not whole_groups:
            parts = list(torch.arange(len(data)).split(size))

        def evaluated(first: list[Compared] | None) -> Iterator[tuple[Evaluated, Compared]]:
            known = iter(first or ())
            for rows in parts:
                for part in core.noised(named[rows], steps[rows], core.micro_batch):
                    groups = list(zip(part.prompts, (part.row // len(rows)).tolist(), strict=True))
                    policy = core.predict(part.z, part.k, part.conditioning)
                    reference = next(known).reference if first else self.reference_outputs(core, part)
                    q = self.compared(part, policy, reference)
                    yield (part, policy, reference, q), Compared(groups, q.detach(), reference)

        for (part, policy, reference, q), mean in two_passes(evaluated, group_means, complete=whole_groups):
            values, metrics = self.loss(part, policy, reference, q, mean)
            yield Loss(values / steps.shape[1], metrics | distances(policy, reference))


def by_group(batch: Rows) -> Rows:
    """The batch with every sample named as the first of its prompt: what is drawn by the name is then shared."""
    first: dict[str, tuple[str, int]] = {}
    for prompt, name in zip(batch.prompts, batch.samples, strict=True):
        first.setdefault(prompt, name)
    return replace(batch, samples=[first[prompt] for prompt in batch.prompts])


def group_means(parts: list[Compared]) -> Iterator[Tensor]:
    """The mean of q over the group of each noised sample [n], for every part; together they hold whole groups."""
    groups = [group for part in parts for group in part.groups]
    means = group_mean(groups, torch.cat([part.q for part in parts]))
    return iter(means.split([len(part.q) for part in parts]))
