"""The trajectories of a round: which samples, their paths, their rewards."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.core import Core
from bench.method import Method
from bench.runtime import processes
from bench.sampling.noise import generator
from bench.sampling.trajectory import Batch, Trajectory, step_kl
from bench.settings import TrainConfig


def sample_names(number: int, prompts: list[str], train: TrainConfig, seed: int) -> list[tuple[str, int]]:
    """Names of a round's samples: prompts in a new order for each pass over them, samples numbered across passes."""
    count, each = train.prompts_per_round, train.samples_per_prompt
    first = number * count
    places = [divmod(position, len(prompts)) for position in range(first, first + count)]
    orders = {
        epoch: generator(seed, "select", "prompts", step=epoch).permutation(len(prompts))
        for epoch in {epoch for epoch, _ in places}
    }
    chosen = [(prompts[orders[epoch][place]], epoch) for epoch, place in places]
    return [(prompt, epoch * each + i) for prompt, epoch in chosen for i in range(each)]


@torch.no_grad()
def sample_paths(core: Core, method: Method, batch: Batch, number: int) -> Trajectory:
    """The method's trajectories of round `number`, sampled by all processes together."""

    def sample(part: Batch) -> dict[str, Tensor]:
        path = method.collect(core, part, number)
        tensors = {name: getattr(path, name) for name in ("latents", "noisy", *method.needs.record)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    with core.meter.phase("rollout"):
        parts, pace = list(batch.split(core.sample_batch)), core.pace(method.needs.uneven)
        tensors = processes.map_parts(parts, sample, pace, core.meter.uncounted)
        return Trajectory(batch.prompts, batch.samples, batch.conditioning, **tensors)


@torch.no_grad()
def path_kl(core: Core, method: Method, batch: Batch) -> float:
    """The policy's path KL to the prior in nats, a mean over the batch, sampled by all processes together."""

    def measure(part: Batch) -> dict[str, Tensor]:
        path = method.sample(core, part, record=frozenset({"model_output", "prior_output"}))
        return {"nats": step_kl(core.kernel, path).sum(1)}

    with core.meter.phase("rollout"):
        parts, pace = list(batch.split(core.sample_batch)), core.pace(method.needs.uneven)
        return float(processes.map_parts(parts, measure, pace, core.meter.uncounted)["nats"].mean())


@torch.no_grad()
def with_rewards(core: Core, data: Trajectory) -> Trajectory:
    """The trajectories with their rewards, scored by all processes together. Raises what `Core.check` raises.

    Of a reward that may miss, NaN stands for a score that is missing.
    """

    def score(part: Trajectory) -> dict[str, Tensor]:
        return core.rewards_and_terms(part.latents[:, -1], part.prompts)

    with core.meter.phase("reward"):
        scored: dict[str, Any] = processes.map_parts(list(data.split(core.micro_batch)), score)
        data = replace(data, **scored)
        with processes.together():
            core.check(missing=core.reward_model.may_miss)
    return data


def complete_groups(data: Trajectory) -> tuple[Trajectory, int]:
    """The rows of the prompts all of whose samples have a score, and how many scores are missing."""
    assert data.rewards is not None
    missing = data.rewards.isnan().tolist()
    incomplete = {prompt for prompt, gone in zip(data.prompts, missing, strict=True) if gone}
    kept = torch.tensor([prompt not in incomplete for prompt in data.prompts])
    return data[kept], sum(missing)
