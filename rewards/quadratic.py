"""A quadratic reward on points."""

import torch
from pydantic import Field
from torch import Tensor

from bench import Config, Reward
from bench.errors import BenchError


class QuadraticConfig(Config):
    """Options of the quadratic reward."""

    center: list[float] = Field([3.0, 0.0], min_length=1, description="c; its length is the points' dimension")
    width: float = Field(6.0, gt=0, description="s")


class Quadratic(Reward):
    """`r(x) = −‖x − c‖² / s`: on the ring, modes weigh less the farther they are from the one at c."""

    Config = QuadraticConfig
    config: QuadraticConfig
    inputs = "points"
    scale = "at most 0, at c; −6 across the ring"
    source = "closed form"
    suite = "ring"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        if len(self.config.center) != images.shape[1]:
            raise BenchError(f"reward.center has {len(self.config.center)} numbers, and a point has {images.shape[1]}.")
        return -(images - torch.tensor(self.config.center).to(images)).square().sum(1) / self.config.width
