"""The model that methods see: a latent diffusion or flow-matching model behind a few verbs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bench.few_step import FewStep
from bench.settings import ModelConfig

Output = Literal["epsilon", "v_prediction", "flow"]  # noise ε, v = αε − sx, velocity ε − x


@dataclass(frozen=True)
class Conditioning:
    """What the network gets in the place of prompts: named tensors [B, …] (text states, …), one row per prompt."""

    parts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: slice | Tensor) -> "Conditioning":
        """The rows named by a slice, an index or a mask, which is copied to where each part lies.

        So an index on a device makes it wait where a part lies on the CPU.
        """
        if isinstance(rows, slice):
            return Conditioning({name: part[rows] for name, part in self.parts.items()})
        return Conditioning({name: part[rows.to(part.device)] for name, part in self.parts.items()})

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


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelSpec:
    """What sampling has to know of a model. Its configuration files say it, before any weights load.

    latent_shape: shape of one latent, without the batch. output: what the network predicts (see
    `bench.sampling.kernel.Kernel`). spacing: the time grid that the model was made for.
    Of a diffusion: alphas_cumprod, the signal levels of the training schedule, float32 [T] on the CPU; final_alpha, the
    scheduler's level of a finished sample; steps_offset, that of the "leading" grid.
    Of a flow: shift of its time grid, and tokens, the number of tokens that a latent makes.
    """

    latent_shape: tuple[int, ...]
    output: Output = "epsilon"
    spacing: str = "leading"
    alphas_cumprod: Tensor | None = None
    final_alpha: float = 1.0
    steps_offset: int = 0
    shift: float = 3.0
    tokens: int = 4096


class DiffusionModel(ABC):
    """A model as `Core` sees it: encode, predict, decode, adapters, save and load.

    spec: what sampling has to know of it. device: where it runs. network: the denoiser, whose calls are counted.
    guidance: the scale of classifier-free guidance; 1: none.
    decoder_batch: how many rows are decoded and scored at a time when the reward is differentiated. Those graphs are
    the largest of a run. points: whether samples are points and not images.
    modes: [M, d], the centres of the prior's modes, of a model that knows them.
    mixture: the prior's density, `bench.models.mixture.Mixture`, of a model that knows it, else None.
    few_step: of a class that is a few-step student by itself; a pipeline's is on its card.
    sharded: whether every process keeps a part of the weights, so that all have to call the network equally often.
    """

    spec: ModelSpec
    device: torch.device
    network: nn.Module
    guidance: float = 1
    decoder_batch: int = 1 << 20
    points: ClassVar[bool] = False
    few_step: ClassVar[FewStep | None] = None
    sharded: bool = False
    modes: Tensor | None = None
    mixture: Any = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""
        return self.spec.latent_shape

    @property
    def output(self) -> Output:
        """What the network predicts."""
        return self.spec.output

    @classmethod
    @abstractmethod
    def create(
        cls, folder: Path | None, config: ModelConfig, *, guidance: float, device: torch.device | str, seed: int
    ) -> "DiffusionModel":
        """The configured model. folder: of its weights, None if it has none. seed: of the adapter's first values."""

    @classmethod
    def rows(cls, guidance: float) -> int:
        """How many rows one guided prediction sends through the network: two for classifier-free guidance."""
        return 1

    def with_guidance(self, guidance: float) -> "DiffusionModel":
        """This model with another guidance scale; the adapters are shared. A model without guidance returns itself."""
        return self

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning, one row per prompt; a prompt's row does not depend on its neighbours."""

    @abstractmethod
    def predict(
        self, z: Tensor, t: Tensor, conditioning: Conditioning, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """What the network predicts (see `output`), float32 [B, *latent]; `t` is one time or [B].

        prior: with the adapters switched off. guided: with classifier-free guidance at the model's scale.
        """

    def predict_both(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The policy's prediction with guidance, and the conditional one that it is made of; equal without guidance.

        A model that gets both from one call overrides this.
        """
        guided = self.predict(z, t, conditioning)
        return guided, guided if self.rows(self.guidance) == 1 else self.predict(z, t, conditioning, guided=False)

    def merged(self) -> AbstractContextManager[None]:
        """A block in which the adapters may be merged into the weights, which is faster. They get no gradient there.

        Predictions agree with those outside to rounding. A graph that begins in the block may end after it.
        """
        return nullcontext()

    @abstractmethod
    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A block in which the policy predicts with these values in place of the adapters of the same names.

        No gradient reaches them or the adapters. A graph that begins in the block may end after it.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [0, 1], or points [B, d] of an analytic model; differentiable in `z`.

        Of a model that draws several frames, videos [B, F, 3, H, W].
        """

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
