"""What a reward is, and what it declares about itself."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import options
from bench.errors import BenchError
from bench.hub import Requirement
from bench.runtime import memory


class Reward(ABC):
    """A reward `r(image, prompt)`, higher is better.

    differentiable: whether gradients reach the images.
    inputs: what it scores, "images" or (on analytic models) "points".
    scale: what the numbers mean, in a few words, with their usual range.
    source: paper or repository.
    suite: the named setting that `--reward NAME` selects when nothing else is said.
    files: what must be there before it is built; `bench fetch` gets it (see bench.hub).
    """

    Config: ClassVar[type[options.Config]] = options.Config
    differentiable: ClassVar[bool] = True
    inputs: ClassVar[Literal["images", "points"]] = "images"
    scale: ClassVar[str]
    source: ClassVar[str]
    suite: ClassVar[str] = "emoji"
    files: ClassVar[tuple[Requirement, ...]] = ()

    def __init__(self, config: options.Config, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score float32 images [B, 3, H, W] in [0, 1], or points [B, d]; returns float32 [B]."""


def score(reward: Reward, name: str, images: Tensor, prompts: list[str]) -> Tensor:
    """`reward(images, prompts)` [B], held to its contract; whether the numbers are finite is the caller's to ask.

    The reward gets a copy of the images, so that one which writes into them changes no other's. Nothing here waits for
    a device. Raises BenchError, naming the reward, for anything but float32 [B] with a graph where there must be one.
    """
    try:
        with memory.phase():
            scores = reward(images.clone(), list(prompts))
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(f"the reward {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor):
        raise BenchError(f"the reward {name!r} returned {type(scores).__name__}: return a float32 tensor of shape [B].")
    if scores.shape != (len(images),) or scores.dtype not in (torch.float32, images.dtype):
        raise BenchError(
            f"the reward {name!r} returned {scores.dtype} {list(scores.shape)} for {len(images)} images: "
            f"return float32 [{len(images)}]."
        )
    if scores.device != images.device:
        raise BenchError(f"the reward {name!r} returned a tensor on {scores.device} for images on {images.device}.")
    if reward.differentiable and torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:
        raise BenchError(_without_gradient(name))
    return scores


def _without_gradient(name: str) -> str:
    return (
        f"the reward {name!r} declares a gradient, and its values have none (detached, constant or rounded?): compute "
        "them from the images with differentiable operations, or declare differentiable = False."
    )


def gradient(name: str, rewards: Tensor, inputs: Tensor) -> Tensor:
    """`∇ Σ r`, shaped like `inputs`. Raises BenchError if the rewards do not depend on them."""
    gradients = torch.autograd.grad(rewards.sum(), inputs, allow_unused=True)[0] if rewards.requires_grad else None
    if gradients is None:
        raise BenchError(_without_gradient(name))
    return gradients
