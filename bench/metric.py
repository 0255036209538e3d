"""What a metric is: the samples that it looks at, and the numbers that it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bench import options

STRIP = 8  # frames of a video that are shown


@dataclass(frozen=True)
class Samples:
    """Images of one model, with what was recorded while sampling. Rows of one prompt are consecutive.

    images: uint8 [N, 3, H, W], or float32 points [N, d] of an analytic model. Of a video it is the middle frame: frames
        are no independent samples, and metrics count rows.
    videos: uint8 [N, F, 3, H, W] of a model that draws several frames, which rewards score; or None.
    prompts: N strings; splits: N times "train", "validation" or "test".
    rewards: reward name → float32 [N].
    step_kl: [N, K] nats, `‖μ_θ−μ_#‖² / 2σ_k²` at the sampled states, or None (a kernel without densities).
    log_ratio: [N] nats, `log P_#(path) / P_θ(path)`, or None.
    output_norm: [N, K], `‖o_θ‖ / ‖o_#‖` at the sampled states, or None (the prior's own, or no path).
    latents: float32 [N, *latent], of a model whose density is known, or None.
    """

    images: Tensor
    prompts: list[str]
    splits: list[str]
    rewards: dict[str, Tensor]
    step_kl: Tensor | None = None
    log_ratio: Tensor | None = None
    output_norm: Tensor | None = None
    latents: Tensor | None = None
    videos: Tensor | None = None

    def strip(self, rows: Tensor | int) -> Tensor:
        """Images of these rows, uint8 [*rows, 3, H, W], as people look at them: a video's frames side by side.

        Of a longer video `STRIP` of them, evenly spaced, with its first and last.
        """
        if self.videos is None:
            return self.images[rows]
        videos = self.videos[rows]
        count = videos.shape[-4]
        places = torch.linspace(0, count - 1, min(count, STRIP)).round().long()
        return videos.index_select(-4, places).movedim(-4, -2).flatten(-2)

    def rows(self, split: str | None = None) -> dict[str, Tensor]:
        """Prompt → long tensor of its rows, in order of appearance; one split or all."""
        groups: dict[str, list[int]] = {}
        for i, (prompt, split_of) in enumerate(zip(self.prompts, self.splits, strict=True)):
            if split in (None, split_of):
                groups.setdefault(prompt, []).append(i)
        return {prompt: torch.tensor(rows) for prompt, rows in groups.items()}


@dataclass(frozen=True)
class Evaluation:
    """What a metric may look at.

    finetuned, prior: same prompts, same noise (paired); reference, floor: two further prior sets, each on noise of its
    own (unpaired), same prompts. reward: name of the reward that was trained on; beta: its inverse temperature.
    features: `(Samples, space=None) → float32 [N, d]`, computed once per set; feature_space: the space if none is said.
    modes: [M, d], centres of the prior's modes where the model knows them.
    targets: prompt → its `bench.evaluation.target.Tilted`, prior × exp(βr), where the prior's density is known and a
        metric asks for it.
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
    targets: Mapping[str, Any] | None = None
    prior_on: Callable[[str, str], Samples] | None = None


@dataclass(frozen=True)
class Measurement:
    """One number of the evaluation, beside the prior's.

    name: the metric's full name, feature space and prompt split included ("fid_prior/efficientnet_lite0").
    value, prior: of the finetuned model and of the prior.
    difference, standard_error: finetuned minus prior, paired where the metric pairs, and its standard error.
    degrees: degrees of freedom of that error (prompts or samples that it rests on, less one); None: not known.
    n: images (or prompts) that the value rests on.
    direction: "higher", "lower" or "none" where neither is better in itself.
    note: why a value is missing (`value` is then None) or what to keep in mind.
    """

    name: str
    value: float | None
    prior: float | None = None
    difference: float | None = None
    standard_error: float | None = None
    degrees: float | None = None
    n: int = 0
    direction: str = "higher"
    unit: str = ""
    note: str = ""


class Metric(ABC):
    """A measure of finished samples; `version` changes whenever its numbers would.

    space: the feature space that it always uses (see bench.evaluation.features); None: the evaluation's, or none.
    support: the values that it can take: "real", "positive" (intervals are taken of logarithms) or "share" (0 to 1, of
        logits). An unbiased estimate that may come out negative is real, whatever it estimates.
    pairs: whether it looks at no other sets than `finetuned` and `prior`, row by row.
    target: whether it compares with `Evaluation.targets`, which are drawn only for such metrics.
    prior_is_best: no model does better than the prior, for the metric counts what training lost. Values beyond the
        prior's count as equal to it, and tables mark only rows that learned: doing nothing wins nothing.
    """

    Config: ClassVar[type[options.Config]] = options.Config
    direction: ClassVar[str]
    unit: ClassVar[str] = ""
    version: ClassVar[int] = 1
    space: ClassVar[str | None] = None
    support: ClassVar[Literal["real", "positive", "share"]] = "real"
    pairs: ClassVar[bool] = False
    target: ClassVar[bool] = False
    prior_is_best: ClassVar[bool] = False

    def __init__(self, config: options.Config):
        self.config = config

    @abstractmethod
    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        """Measure; see `bench.evaluation.evaluator.Evaluation` for what is at hand."""
