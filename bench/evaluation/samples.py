"""What an evaluation holds: sets of finished samples, and what a metric may look at."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Images of one model, with what was recorded while sampling. Rows of one prompt are consecutive.

    images: uint8 [N, 3, H, W], or float32 points [N, d] of an analytic model.
    prompts: N strings; splits: N times "train" or "heldout".
    rewards: reward name → float32 [N].
    step_kl: [N, K] nats, `‖μ_θ−μ_#‖² / 2σ_k²` at the sampled states, or None (a kernel without densities).
    log_ratio: [N] nats, `log P_#(path) / P_θ(path)`, or None.
    output_norm: [N, K], `‖o_θ‖ / ‖o_#‖` at the sampled states, or None (the prior's own, or no path).
    """

    images: Tensor
    prompts: list[str]
    splits: list[str]
    rewards: dict[str, Tensor]
    step_kl: Tensor | None = None
    log_ratio: Tensor | None = None
    output_norm: Tensor | None = None

    def rows(self, split: str | None = None) -> dict[str, Tensor]:
        """Prompt → long tensor of its rows, in order of appearance; one split or all."""
        groups: dict[str, list[int]] = {}
        for i, (prompt, own) in enumerate(zip(self.prompts, self.splits, strict=True)):
            if split in (None, own):
                groups.setdefault(prompt, []).append(i)
        return {prompt: torch.tensor(rows) for prompt, rows in groups.items()}


@dataclass(frozen=True)
class Evaluation:
    """What a metric may look at.

    finetuned, prior: same prompts, same noise (paired); reference, floor: two further prior sets, each on noise of its
    own (unpaired), same prompts. reward: name of the reward that was trained on; beta: its inverse temperature.
    features: `(Samples, space=None) → float32 [N, d]`, computed once per set; feature_space: the space if none is said.
    modes: [M, d], centres of the prior's modes where the model knows them.
    prior_on: `(sampler, purpose) → Samples`: a prior set on the "training" sampler or an "accurate" one, with the noise
        of a purpose ("reference", "floor"); drawn when asked for.
    """

    finetuned: Samples
    prior: Samples
    reference: Samples
    floor: Samples
    reward: str
    beta: float
    features: Callable[..., Tensor]
    feature_space: str
    modes: Tensor | None = None
    prior_on: Callable[[str, str], Samples] | None = None
