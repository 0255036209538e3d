"""A method, a reward and a metric of a package of its own."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from bench import (
    Config,
    Core,
    Evaluation,
    Loss,
    Measurement,
    Method,
    Metric,
    Needs,
    Reward,
    Samples,
    Trajectory,
    gaussian_log_prob,
)
from bench.evaluation.statistics import paired, per_prompt


class RAFTConfig(Config):
    """Options of RAFT."""

    keep: int = Field(1, ge=1, description="samples of a prompt that are imitated")


class RAFT(Method):
    """Reward-ranked finetuning (Dong et al., 2023): raise the likelihood of each prompt's best samples."""

    Config = RAFTConfig
    needs = Needs(rewards=True, density=True)
    recipe = {"optimizer.lr": 3e-4}

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Advantage 1 for the best of a prompt, else 0."""
        best = torch.zeros_like(data.rewards)
        for prompt in set(data.prompts):
            mine = [i for i, own in enumerate(data.prompts) if own == prompt]
            rows = torch.tensor(mine, device=best.device)
            top = data.rewards[rows].topk(min(self.config.keep, len(rows))).indices
            best[rows[top]] = 1.0
        return replace(data, advantages=best)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Minus the log-likelihood, mean over elements, of the chosen trajectories."""
        steps = core.choose_steps(data, 1.0)
        for part in data.transitions(steps, core.micro_batch):
            eps = core.predict(part.z, part.k, part.conditioning)
            mean, std = core.kernel.mean(part.z, eps, part.k), core.kernel.std(part.k, part.z)
            log_prob = gaussian_log_prob(part.z_next, mean, std) / part.z[0].numel()
            yield Loss(-part.advantages * log_prob / steps.shape[1])


class Brightness(Reward):
    """Mean over all pixels and colours."""

    scale = "0 (black) to 1 (white)"
    source = "example"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.flatten(1).mean(1)


class Contrast(Metric):
    """Standard deviation of an image's pixel values; points have none."""

    direction = "none"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        def contrast(samples: Samples) -> Tensor:
            return per_prompt(samples.images.float().flatten(1).std(1) / 255, samples.rows())

        if evaluation.finetuned.images.ndim != 4:
            return []
        n = len(evaluation.finetuned.images)
        return [paired("contrast", contrast(evaluation.finetuned), contrast(evaluation.prior), n=n, direction="none")]
