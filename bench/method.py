"""What a method is, and what it declares about itself.

A plugin is one class in one file: a `Method` here, a `Reward` in `bench.reward`, a `Metric` in `bench.metric`. It is
found by name through `bench.registry`; outside this repository an entry point announces it (`bench.methods`,
`bench.rewards`, `bench.metrics`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bench import options
from bench.core import Core
from bench.model import DiffusionModel
from bench.sampling.trajectory import Batch, Trajectory

Values = TypeVar("Values")
Recorded = TypeVar("Recorded")
Weights = TypeVar("Weights")


@dataclass(frozen=True)
class Needs:
    """What a method asks of a setting; an impossible pair is refused before any model loads.

    training: False for a baseline that changes no weight.
    trajectory: the trainer samples trajectories for the method (False: the method calls `core.rollout` itself).
    rewards: the trajectories carry the rewards of their final images.
    reward_gradient: the reward must be differentiable.
    density: every sampling step must have a positive variance.
    memoryless: the prior's sampling steps must be noising reversed, so that the first noise says nothing of the sample.
    denoiser: the output must be the mean, given z, of what noising would have it (ε, v or velocity), at any level.
        No few-step student has either of these two.
    teacher: the model must be a few-step student whose teacher is here, as `core.teacher()`.
    record: what the rollout keeps, any of "model_output", "prior_output", "log_prob".
    whole_update: the loss normalises over an update's trajectories, so it is not the mean over parts of them.
    current: the loss takes a copy of the adapters for the policy that sampled the round, so none may lie between.
    uneven: how often the network is called depends on which samples a batch holds, not on their number alone.
    adapters: the loss trains the adapters (False: the method's own networks steer the sampler, in `collect` and
        `sample`, and are stored beside the adapters).
    """

    training: bool = True
    trajectory: bool = True
    rewards: bool = False
    reward_gradient: bool = False
    density: bool = False
    memoryless: bool = False
    denoiser: bool = False
    teacher: bool = False
    record: frozenset[str] = frozenset()
    whole_update: bool = False
    current: bool = False
    uneven: bool = False
    adapters: bool = True


@dataclass(frozen=True)
class Strength:
    """The setting that says how far from the prior a method goes, and what `tune.strength` of a sweep tries of it.

    setting: dotted, such as "reward.beta" or "method.kl". values: four of them, so that every method gets the same
    number of trials, in rising order. relative: they are factors of the value that the setting has otherwise.
    """

    setting: str
    values: tuple[float, ...]
    relative: bool = False

    def __post_init__(self) -> None:
        if len(self.values) != STRENGTHS or list(self.values) != sorted(set(self.values)) or self.values[0] < 0:
            raise ValueError(f"Strength.values = {self.values}: give {STRENGTHS} different ones from 0 on, rising")

    def text(self) -> str:
        """ "0, 0.25, 1, 4", or "0.25, 0.5, 1, 2 times its value"."""
        return ", ".join(f"{value:g}" for value in self.values) + " times its value" * self.relative


STRENGTHS = 4  # values of every method
TILT = Strength("reward.beta", (0.25, 0.5, 1.0, 2.0), relative=True)  # of methods that aim at a tilt by exp(βr)


@dataclass(frozen=True)
class Loss:
    """One micro-loss: the trainer calls backward on it at once, so memory holds one micro-batch.

    values: [n], contributions of single rows. The loss of an update is the sum of everything that the method yields
        over the number of trajectories in the update: a method that spreads a trajectory over S rows divides by S.
    metrics: [n] or scalar tensors to log; averaged over rows.
    """

    values: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def two_passes(
    values: Callable[[list[Recorded] | None], Iterable[tuple[Values, Recorded]]],
    weigh: Callable[[list[Recorded]], Iterable[Weights]],
    *,
    complete: bool,
) -> Iterator[tuple[Values, Weights]]:
    """The values of each micro-batch, with their gradient, and weights that depend on those of other micro-batches.

    For a loss such as `Σ_i w_i v_i` whose weights are a function of all values `v_1 … v_N`: advantages normalised over
    an update, or a softmax over a group. The first pass computes all values without gradient, which gives the weights;
    the second computes them again, with gradient, one micro-batch at a time. Such a method has `needs.whole_update`.

    values(first): one pass. It yields, for each micro-batch, its values and what to keep of them without gradient: what
        `weigh` needs, and what the second pass need not compute again. `first` is None in the first pass, and in the
        second what the first pass recorded of each micro-batch.
    weigh(recorded): the weights of each of these micro-batches.
    complete: whether every micro-batch holds all that its own weights depend on. Then one pass is enough, and `weigh`
        gets one micro-batch at a time.
    """
    if complete:
        for with_gradient, recorded in values(None):
            (weights,) = weigh([recorded])
            yield with_gradient, weights
        return
    with torch.no_grad():
        first = [recorded for _, recorded in values(None)]
    for (with_gradient, _), weights in zip(values(first), weigh(first), strict=True):
        yield with_gradient, weights


@dataclass(frozen=True)
class Copy:
    """A copy of the adapters that follows them: `copy ← d·copy + (1−d)·θ`.

    decay: d, a function of the updates made so far. rounds: how many lie between two of these steps; None: they follow
    every update. stages: of so many rounds each, and the copy stands still in the last; without `rounds` all stages are
    equal parts of the run.
    """

    decay: Callable[[int], float]
    rounds: int | None = None
    stages: int | None = None

    def interval(self, run: int) -> int | None:
        """Rounds between two steps in a run of so many; None: they follow every update."""
        return max(1, run // self.stages) if self.stages and self.rounds is None else self.rounds


@dataclass(frozen=True)
class NFE:
    """The least number of network function evaluations that a method's equations need for one round, as states.

    A state that two terms of a loss use counts once; a vector-Jacobian product of summed cotangents counts once; what
    the rollout has recorded, and what only saves memory (gradient checkpointing), does not count.

    rollout, forward, backward: guided predictions in sampling, in the losses, and back through the network.
    unguided: predictions forward of the conditional half alone, besides these.
    """

    rollout: int
    forward: int
    backward: int
    unguided: int = 0


class Method(ABC):
    """A finetuning method: it owns its loss and nothing else.

    The trainer owns optimisers, clipping, accumulation and checkpoints; the core owns the sampler, guidance, precision
    and devices. `recipe` overrides the run's defaults for this method, keyed like `--set` ("optimizer.lr"). `strength`
    is None where only early stopping keeps a method near the prior. A configuration that needs more than its class sets
    `needs` of its own in `__init__`.
    """

    Config: ClassVar[type[options.Config]] = options.Config
    needs: Needs = Needs()
    recipe: ClassVar[dict[str, Any]] = {}
    strength: ClassVar[Strength | None] = None

    def __init__(self, config: options.Config):
        self.config = config

    @abstractmethod
    def losses(self, core: Core, data: Any) -> Iterator[Loss]:
        """Yield micro-losses of one update, or of a shard of it: at most `train.micro_batch` trajectories.

        `data` is a `Trajectory` unless `needs.trajectory` is False, and the whole update if `needs.whole_update`.
        Several processes compute different shards, so nothing in here may wait for another process. Where they share
        the network's weights (`model.shard`) they do so in step, or, if `needs.uneven`, compute all shards alike.
        """

    def copies(self) -> dict[str, Copy]:
        """Copies of the adapters to keep, by name; `core.predict(…, weights=name)` evaluates one."""
        return {}

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """The trajectories of round `number`; the options of `core.rollout` say who samples and how."""
        return core.rollout(batch, record=self.needs.record)

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """See a whole round of trajectories once, before it is cut into updates (advantages need this)."""
        return data

    def tilted(self) -> bool:
        """Whether, as configured, a loss of zero means samples from `p_# exp(βr)`; `bench selftest` then checks it."""
        return False

    def combines(self) -> tuple[str, ...]:
        """What `reward.combine` may be besides "rewards".

        "advantages" and "gdpo" if, as configured, the loss sees rewards through `group_advantages` alone.
        """
        return ()

    def unfit(self, steps: int, group: int) -> str | None:
        """Why the method could do nothing with K sampling steps and `group` samples of a prompt, or None.

        group: in a round; in an update, where the loss takes whole ones.
        """
        return None

    def nfe(self, core: Core, batch: Batch) -> NFE | None:
        """What one round on `batch` needs, with the random choices that the method itself would make; None: not said.

        `bench profile` puts what it measures beside it.
        """
        return None

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """Extra networks to train, by name; each has its own optimiser group under `optimizer.networks`."""
        return {}

    def sample(self, core: Core, batch: Batch, **options: Any) -> Trajectory:
        """Finished samples for the evaluation, with the options of `core.rollout`.

        A method that spends compute at sampling time overrides this; without a recorded path (`model_output` and
        `prior_output`) the metrics that need one are refused.
        """
        return core.rollout(batch, **options)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
