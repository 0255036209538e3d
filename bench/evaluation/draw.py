"""Drawing the samples that an evaluation measures: named, on noise of their own, decoded, with their divergence."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from bench.core import Core
from bench.errors import NonFiniteError
from bench.evaluation.features import middle_frame
from bench.method import Method
from bench.metric import Samples
from bench.prompts import SPLITS, PromptSet
from bench.runtime import memory, processes
from bench.sampling.noise import Purpose
from bench.sampling.trajectory import Batch, Trajectory, step_kl
from bench.settings import EvaluationConfig
from bench.training.nonfinite import PRIOR_NOT_FINITE


def sample_names(prompts: PromptSet, config: EvaluationConfig) -> tuple[list[tuple[str, int]], list[str]]:
    """Names of the evaluation samples, rows of one prompt consecutive, and the split of each row."""
    counts = {split: getattr(config, f"{split}_prompts") for split in SPLITS}
    chosen = [(prompt, split) for split in SPLITS for prompt in getattr(prompts, split)[: counts[split]]]
    names = [(prompt, i) for prompt, _ in chosen for i in range(config.samples_per_prompt)]
    return names, [split for _, split in chosen for _ in range(config.samples_per_prompt)]


def draw(
    core: Core,
    names: list[tuple[str, int]],
    splits: list[str],
    *,
    seed: int,
    purpose: Purpose = "evaluate",
    prior: bool = False,
    method: Method | None = None,
    weights: str | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Samples:
    """Sample and decode images; of a finetuned model also its outputs' norm and, with densities, its divergence.

    method: whose `sample` draws; None means `core.rollout`. weights: the copy of the adapters that samples. on_batch:
    called with the number of rows finished.
    """
    sample = partial(method.sample, core) if method and not prior else core.rollout
    records = frozenset() if prior else frozenset({"model_output", "prior_output"})
    pace = core.pace(bool(method and method.needs.uneven and not prior))

    @torch.no_grad()
    def finish(part: Batch) -> dict[str, Tensor]:
        with memory.phase("rollout"):
            path = sample(part, purpose=purpose, seed=seed, record=records, prior=prior, weights=weights)
        core.check(missing=core.reward_model.may_miss)  # a method may have chosen by rewards
        with memory.phase("decode"):
            image = core.model.decode(path.latents[:, -1])
        if not bool(torch.isfinite(image).all()):
            remedy = "The finetuned samples are not finite: lower optimizer.lr or reward.beta."
            raise NonFiniteError(PRIOR_NOT_FINITE if prior else remedy)
        tensors = {"images": (image * 255).round().byte() if image.ndim > 2 else image}
        if image.ndim == 5:
            tensors["videos"] = tensors["images"]
            tensors["images"] = middle_frame(tensors["images"])
        if core.model.mixture is not None:
            tensors["latents"] = path.latents[:, -1]
        if path.model_output is not None and path.prior_output is not None:
            policy, prior_output = path.model_output.flatten(2), path.prior_output.flatten(2)
            tensors["output_norm"] = policy.norm(dim=2) / prior_output.norm(dim=2)
            if core.kernel.has_density:
                tensors |= _divergence(core, path)
        on_batch(len(part) * (1 if pace == "alike" else processes.count()))
        return {name: value.cpu() for name, value in tensors.items()}

    parts = list(core.batch(names).split(core.sample_batch))
    drawn = processes.map_parts(parts, finish, pace, core.meter.uncounted)
    tensors = {name: value.cpu() for name, value in drawn.items()}
    return Samples(prompts=[prompt for prompt, _ in names], splits=splits, rewards={}, **tensors)


def _divergence(core: Core, path: Trajectory) -> dict[str, Tensor]:
    """`step_kl` [B, K], and `log_ratio`, `log P_#/P_θ` of the path [B], summed in float64."""
    policy, prior = cast(Tensor, path.model_output), cast(Tensor, path.prior_output)
    ratio = torch.zeros(len(path), dtype=torch.float64, device=path.latents.device)
    for k in range(path.steps):
        z, z_next = path.latents[:, k], path.latents[:, k + 1]
        mean, base = (core.kernel.mean(z, output[:, k], k) for output in (policy, prior))
        variance = core.kernel.std(k, z) ** 2
        step = ((z_next - mean) ** 2 - (z_next - base) ** 2) / (2 * variance)
        ratio += step.flatten(1).sum(1, dtype=torch.float64)
    return {"step_kl": step_kl(core.kernel, path), "log_ratio": ratio}
