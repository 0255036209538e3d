"""The scores that rewards give to sets of samples."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bench import registry
from bench.errors import NonFiniteError
from bench.metric import Samples
from bench.reward import Reward, score
from bench.runtime import memory, processes


def score_samples(samples: Samples, rewards: Mapping[str, Reward], rows: int, whose: str = "these") -> Samples:
    """The samples with rewards of the 8-bit images, so that every set is scored on what is shown, so many rows at once.

    whose: for the NonFiniteError that is raised where a reward is not finite. Of a reward that may miss, NaN stands for
    a score that is missing.
    """

    shown = samples.images if samples.videos is None else samples.videos

    @torch.no_grad()
    def scores_of(part: Tensor) -> dict[str, Tensor]:
        prompts, scores = [samples.prompts[i] for i in part.tolist()], {}
        for name, reward in rewards.items():
            with memory.phase("reward"):
                scores[name] = score(reward, name, as_seen(shown[part].to(reward.device)), prompts).cpu()
            missing = scores[name].isnan() & reward.may_miss
            if not bool((torch.isfinite(scores[name]) | missing).all()):
                raise NonFiniteError(
                    f"the reward {name!r} is not finite on {whose} samples: repair it, or leave it out of "
                    "evaluation.rewards (bench eval does that for a trained run)."
                )
        return scores

    scores = processes.map_parts(torch.arange(len(samples.images)).split(rows), scores_of)
    return replace(samples, rewards={name: values.cpu() for name, values in scores.items()})


def as_seen(images: Tensor) -> Tensor:
    """Images as rewards and feature spaces take them: uint8 as float32 in [0, 1]; points unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def load_reward(name: str, options: dict | None = None, device: torch.device | str = "cpu") -> Reward:
    """A reward by name with its own default options or those given."""
    reward = registry.load("rewards", name)
    return reward(reward.Config(**(options or {})), device)
