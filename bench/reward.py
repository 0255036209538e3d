"""What a reward is, and what it declares about itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
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
    frames: whether it gets videos [B, F, 3, H, W], a picture as one of a single frame. One that gets pictures alone
        scores a video by the mean of its frames' scores.
    scale: what the numbers mean, in a few words, with their usual range.
    source: paper or repository.
    suite: the named setting that `--reward NAME` selects when nothing else is said.
    files: what must be there before it is built; `bench fetch` gets it (see bench.hub).
    may_miss: whether NaN in the place of a score says that there is none: a service failed, or its answer could not be
        read. Training leaves out the group of such a sample, and an evaluation averages the others.
    setup: what must be there besides, in a few words, such as "a server".
    columns: of the prompt file, those that it cannot do without.
    metadata: prompt → the file's other columns by name, as text (see bench.prompts). A run sets it before the first
        score, to all prompts of its set; it is empty for a set that is only a list of prompts.
    """

    Config: ClassVar[type[options.Config]] = options.Config
    differentiable: ClassVar[bool] = True
    inputs: ClassVar[Literal["images", "points"]] = "images"
    frames: ClassVar[bool] = False
    scale: ClassVar[str]
    source: ClassVar[str]
    suite: ClassVar[str] = "emoji"
    files: ClassVar[tuple[Requirement, ...]] = ()
    setup: ClassVar[str] = ""
    may_miss: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()
    metadata: Mapping[str, Mapping[str, str]] = MappingProxyType({})

    def __init__(self, config: options.Config, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score float32 images [B, 3, H, W] in [0, 1], videos if it declares `frames`, or points [B, d].

        Returns float32 [B].
        """

    def set_metadata(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Tell the reward, and those that it consists of, what is known of the prompts."""
        self.metadata = metadata

    def column(self, name: str, prompt: str) -> str:
        """What the prompt file's column says of a prompt. Raises BenchError if it says nothing."""
        if not (cell := self.metadata.get(prompt, {}).get(name, "")):
            raise BenchError(without_column(name, prompt))
        return cell


def without_column(name: str, prompt: str) -> str:
    """The sentence for a prompt that lacks what a reward reads."""
    return (
        f"the reward reads the column {name!r} of the prompt file, which has nothing there for {prompt!r}: use a .csv "
        "or .parquet file with this column, or a prompt set that has it (bench ls prompts)."
    )


def score(reward: Reward, name: str, images: Tensor, prompts: list[str]) -> Tensor:
    """`reward(images, prompts)` [B], held to its contract; whether the numbers are finite is the caller's to ask.

    images: [B, 3, H, W], videos [B, F, 3, H, W], or points; the reward sees them as it declares (`Reward.frames`).

    The reward gets a copy of the images, so that one which writes into them changes no other's. Nothing here waits for
    a device. Raises BenchError, naming the reward, for anything but float32 [B] with a graph where there must be one.
    """
    if images.dim() == 5 and not reward.frames:
        each = score(reward, name, images.flatten(0, 1), [prompt for prompt in prompts for _ in range(images.shape[1])])
        return each.unflatten(0, images.shape[:2]).mean(1)
    if images.dim() == 4 and reward.frames:
        images = images.unsqueeze(1)
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
