"""What a reward is, and what it declares about itself."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench.options import Config
from bench.weights.hub import Need


class Reward(ABC):
    """A reward `r(image, prompt)`, higher is better.

    differentiable: whether gradients reach the images.
    inputs: what it scores, "images" or (on analytic models) "points".
    scale: what the numbers mean, in a few words, with their usual range.
    source: paper or repository.
    suite: the named setting that `--reward NAME` selects when nothing else is said.
    files: what must be there before it is built; `bench fetch` gets it (see bench.weights.hub).
    """

    Config: ClassVar[type[Config]] = Config
    differentiable: ClassVar[bool] = True
    inputs: ClassVar[Literal["images", "points"]] = "images"
    scale: ClassVar[str]
    source: ClassVar[str]
    suite: ClassVar[str] = "emoji"
    files: ClassVar[tuple[Need, ...]] = ()

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score float32 images [B, 3, H, W] in [0, 1], or points [B, d]; returns float32 [B]."""
