"""A linear reward on points."""

import torch
from pydantic import Field
from torch import Tensor

from bench import Config, Reward
from bench.errors import BenchError


class LinearConfig(Config):
    """Options of the linear reward."""

    direction: list[float] = Field([1.3, -0.4], min_length=1, description="w; its length is the points' dimension")


class Linear(Reward):
    """`r(x) = w·x`: tilting a Gaussian by it moves the mean and leaves the variance, in closed form."""

    Config = LinearConfig
    config: LinearConfig
    inputs = "points"
    scale = "any number; 0 at the origin"
    source = "closed form"
    suite = "gaussian"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        if len(self.config.direction) != images.shape[1]:
            raise BenchError(
                f"reward.direction has {len(self.config.direction)} numbers, and a point has {images.shape[1]}."
            )
        return images @ torch.tensor(self.config.direction).to(images)
