"""Weights that are numbers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bench.errors import BenchError


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity; None if there is none."""
    return next((name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())), None)


def require_finite_weights(tensors: Iterable[tuple[str, Tensor]], origin: Path) -> None:
    """Raise BenchError, with where they come from, if a tensor holds NaN or an infinity."""
    if name := nonfinite(tensors):
        raise BenchError(f"{origin}: {name} holds NaN or infinite values: fetch or make these weights again.")
