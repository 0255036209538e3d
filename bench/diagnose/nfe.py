"""What NFE a method's equations need: `bench profile --all` and `bench verify` compare counts with it."""

from dataclasses import dataclass, replace

from bench.core import Core
from bench.diagnose.selftest.scaffold import gaussian_core
from bench.method import Method
from bench.model import Conditioning
from bench.prompts import load_prompts
from bench.runs.build import build_method
from bench.runs.duration import prediction_rows
from bench.sampling.trajectory import Batch
from bench.settings import RunConfig
from bench.training.rounds import sample_names


@dataclass(frozen=True)
class Rows:
    """NFE in rows of the denoiser's batches: of the rollout, and of the losses forward and backward.

    A guided prediction is two rows, and one without guidance. Backward rows are those that a gradient enters: one pass
    for parameters, and one for every cotangent that does not go with it.
    """

    rollout: int
    forward: int
    backward: int


def required_rows(core: Core, method: Method, batch: Batch) -> Rows | None:
    """What one round on `batch` needs at the least, by `Method.nfe`; None where the method does not say."""
    rows = core.model.rows(core.model.guidance)
    if not (nfe := method.nfe(core, batch)):
        return None
    return Rows(rows * nfe.rollout, rows * nfe.forward + nfe.unguided, rows * nfe.backward)


def least_counts(core: Core, config: RunConfig) -> dict[str, int]:
    """Count of `bench.runtime.meter.Meter` → what a run has at the least, from its configuration alone.

    Of the denoiser's rows by `Method.nfe`, where the method has it, with the choices that it makes in every update.
    """
    train, method = config.train, build_method(config)
    core = replace(core, model=core.model.with_guidance(min(config.sampler.guidance, config.loss_guidance())))
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split).train
    parts, rounds = train.updates_per_round, -(-train.updates // train.updates_per_round)
    counts = (
        {"reward_calls": rounds * train.prompts_per_round * train.samples_per_prompt} if method.needs.rewards else {}
    )
    forwards = backwards = 0
    for update in range(train.updates if method.needs.training else 0):
        number, part = divmod(update, parts)
        names = sample_names(number, prompts, train, config.seed)[part::parts]
        rows = required_rows(core, method, Batch([prompt for prompt, _ in names], names, Conditioning({})))
        if rows is None:
            return counts
        forwards += rows.rollout + rows.forward
        backwards += rows.backward
    return counts | {"network_forwards": forwards, "network_backwards": backwards}


def rows_of_update(config: RunConfig) -> float | None:
    """NFE, forward and backward, that an update needs at the least, on average over a round.

    From the configuration alone, by `Method.nfe`; None where the method does not say it.
    """
    method, train = build_method(config), config.train
    core = replace(gaussian_core(config.sampler.steps), seed=config.seed)  # choices of steps see no more of a model
    names = [(str(i), j) for i in range(train.prompts_per_round) for j in range(train.samples_per_prompt)]
    parts = [names[part :: train.updates_per_round] for part in range(train.updates_per_round)]
    rows = prediction_rows(config, config.sampler.model_copy(update={"guidance": config.loss_guidance()}))
    total = 0
    for part in parts:
        needed = method.nfe(core, Batch([prompt for prompt, _ in part], part, Conditioning({})))
        if needed is None:
            return None
        total += (needed.rollout + needed.forward + needed.backward) * rows // config.sampler.steps + needed.unguided
    return total / train.updates_per_round
