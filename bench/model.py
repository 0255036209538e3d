"""The model that methods see: a latent diffusion or flow-matching model behind five verbs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bench.settings import ModelConfig

Output = Literal["epsilon", "v_prediction", "flow"]  # noise ε, v = αε − sx, velocity ε − x


@dataclass(frozen=True)
class Conditioning:
    """What prompts become: named tensors [B, …] (text states, pooled text, …), a row a prompt, indexed together."""

    parts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """The rows named by a slice, an index or a mask."""
        return Conditioning({name: part[rows] for name, part in self.parts.items()})

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.parts.values())).device

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same on another device."""
        return Conditioning({name: part.to(device) for name, part in self.parts.items()})

    def expand(self, rows: int) -> "Conditioning":
        """A single row as many times as asked for, without a copy."""
        return Conditioning({name: part.expand(rows, *part.shape[1:]) for name, part in self.parts.items()})

    @staticmethod
    def join(parts: "Sequence[Conditioning]") -> "Conditioning":
        """The rows of all, in order."""
        return Conditioning({name: torch.cat([one.parts[name] for one in parts]) for name in parts[0].parts})


class DiffusionModel(ABC):
    """encode, predict, decode, adapters, save/load. The core reaches a model through these alone.

    latent_shape: shape of one latent, without the batch; device: where it runs.
    guidance: scale of classifier-free guidance; 1: none.
    output: what the network predicts (see `bench.sampling.kernel.Kernel`); spacing: the grid that is its own.
    A diffusion has alphas_cumprod: float32 [T], signal levels of the training schedule, on the CPU; final_alpha: the
    scheduler's level of a finished sample; steps_offset: of its "leading" grid. A flow has shift, of its time grid, and
    tokens, how many its latent makes. network: the denoiser, whose passes are counted.
    decoder_batch: rows whose decoder and reward are differentiated at a time: no slower than more, and their graphs are
    the largest there are. modes: [M, d], centres of the prior's modes where they are known.
    """

    latent_shape: tuple[int, ...]
    device: torch.device
    guidance: float = 1
    output: Output = "epsilon"
    spacing: str = "leading"
    alphas_cumprod: Tensor
    final_alpha: float
    steps_offset: int = 0
    shift: float = 3.0
    tokens: int = 4096
    network: nn.Module
    decoder_batch: int = 1 << 20
    modes: Tensor | None = None

    @classmethod
    @abstractmethod
    def create(
        cls, folder: Path | None, config: ModelConfig, *, guidance: float, device: torch.device | str, seed: int
    ) -> "DiffusionModel":
        """The configured model; folder: of its weights, None for one without. seed: of the adapter's start."""

    @classmethod
    def rows(cls, guidance: float) -> int:
        """How many rows go through the network for a guided prediction: two for classifier-free guidance."""
        return 1

    def with_guidance(self, guidance: float) -> "DiffusionModel":
        """This model, its adapters and all, with another guidance scale; itself where it knows no guidance."""
        return self

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning, one row per prompt; a prompt's row does not depend on its neighbours."""

    @abstractmethod
    def predict(
        self, z: Tensor, t: Tensor, conditioning: Conditioning, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """The network's own output (see `output`), float32 [B, *latent]; `t` is one time or [B].

        prior: with the finetuned part switched off. guided: with classifier-free guidance (the model's own scale).
        """

    def predict_both(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The policy's prediction with guidance, and the one without that it is made of; the same where there is none.

        A family that makes both in one call overrides this.
        """
        guided = self.predict(z, t, conditioning)
        return guided, guided if self.rows(self.guidance) == 1 else self.predict(z, t, conditioning, guided=False)

    def merged(self) -> AbstractContextManager[None]:
        """A block in which no gradient reaches the adapters, so that they may be folded into the weights: faster.

        Predictions agree with those outside it to rounding. A graph that begins in the block may end after it.
        """
        return nullcontext()

    @abstractmethod
    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A block in which predictions of the policy take these values in the place of the adapters', by their names.

        No gradient reaches them or the adapters. A graph that begins in the block may end after it.
        """

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
