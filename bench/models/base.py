"""The model that methods see: a latent diffusion model behind five verbs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn


class DiffusionModel(ABC):
    """encode, predict, decode, adapters, save/load. The core reaches a model through these alone.

    latent_shape: shape of one latent, without the batch; device: where it runs.
    alphas_cumprod: float32 [T], signal levels of the training schedule, on the CPU; final_alpha: the scheduler's level
    of a finished sample; steps_offset: of its "leading" grid. network: the denoiser, whose passes are counted.
    modes: [M, d], centres of the prior's modes where they are known.
    """

    latent_shape: tuple[int, ...]
    device: torch.device
    alphas_cumprod: Tensor
    final_alpha: float
    steps_offset: int = 0
    network: nn.Module
    modes: Tensor | None = None

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Conditioning, one row per prompt; a prompt's row does not depend on its neighbours."""

    @abstractmethod
    def predict(
        self, z: Tensor, t: Tensor, conditioning: Tensor, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """Noise prediction `ε(z, t, c)`, float32 [B, *latent]; `t` is one time or [B].

        prior: with the finetuned part switched off. guided: with classifier-free guidance (the model's own scale).
        """

    def merged(self) -> AbstractContextManager[None]:
        """A block in which no gradient reaches the adapters, so that they may be folded into the weights: faster.

        Predictions agree with those outside it to rounding. A graph that begins in the block may end after it.
        """
        return nullcontext()

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [0, 1], or points [B, d] of an analytic model; differentiable in `z`."""

    @abstractmethod
    def adapters(self) -> dict[str, nn.Parameter]:
        """The parameters that finetuning changes, by name."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the finetuned part to `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises FileNotFoundError or ValueError, naming the file, if it does not fit."""

    @abstractmethod
    def latent_network(self, channels: Sequence[int], layers_per_block: int = 1) -> nn.Module:
        """A fresh network `(z, t, conditioning) → [B, *latent]` whose output starts at exactly zero.

        For learned quantities on the latent space (the residual flow's gradient `g_φ`). Weights are seeded by name.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the prior's weights and settings; it keys the cache of prior samples."""
