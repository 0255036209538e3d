"""Models that predict exactly what their prior's score says, plus a small finetuned part."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from bench.model import Conditioning, DiffusionModel
from bench.runtime.finite import require_finite_weights
from bench.settings import ModelConfig

FILE = "analytic.safetensors"
TIMES = 1000


class ExactModel(DiffusionModel):
    """A prior with an exact score. There is no guidance, and nothing but the device can be configured.

    dtype: of parameters, schedule and predictions; float64 shows whether an equation holds exactly. finetuned: the part
    that is trained. network: `(z, t, conditioning, prior) → [B, *latent]`, which holds it.
    """

    dtype: torch.dtype
    finetuned: nn.Module
    _replaced: Mapping[str, Tensor] = {}

    @classmethod
    def create(
        cls, folder: Path | None, config: ModelConfig, *, guidance: float, device: torch.device | str, seed: int
    ) -> "ExactModel":
        """See `DiffusionModel.create`."""
        return cls(device=device, seed=seed)  # type: ignore[call-arg]  # of the classes that have a name

    def predict(
        self, z: Tensor, t: Tensor, conditioning: Conditioning, *, prior: bool = False, guided: bool = True
    ) -> Tensor:
        """See `DiffusionModel.predict`; in the model's dtype. Without guidance, `guided` changes nothing."""
        inputs = (z.to(self.dtype), t.to(z.device).expand(len(z)), conditioning, prior)
        return functional_call(self.network, dict(self._replaced), inputs)

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """See `DiffusionModel.using`."""
        before, self._replaced = self._replaced, {f"finetuned.{name}": value for name, value in weights.items()}
        try:
            yield
        finally:
            self._replaced = before

    def adapters(self) -> dict[str, nn.Parameter]:
        """The parameters of the finetuned part."""
        return dict(self.finetuned.named_parameters())

    def save(self, folder: Path) -> None:
        """Write the finetuned part as safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: parameter.detach().cpu() for name, parameter in self.adapters().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises FileNotFoundError, ValueError, or BenchError if it is not finite."""
        state, adapters = load_file(folder / FILE), self.adapters()
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in adapters.items()}:
            raise ValueError(f"{folder / FILE} does not fit this model (another number of dimensions?)")
        require_finite_weights(state.items(), folder / FILE)
        for name, parameter in adapters.items():
            parameter.data.copy_(state[name])


def time_features(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of times t [B] at eight frequencies: [B, 16]."""
    frequencies = math.pi * 2.0 ** torch.arange(-1, 7, dtype=dtype, device=t.device)
    phase = (t / TIMES).to(dtype)[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], 1)
