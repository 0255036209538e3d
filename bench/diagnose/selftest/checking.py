"""What a check may raise, and what several kinds check."""

import pickle
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Failed(Exception):
    """The plugin breaks its contract; the message says how."""


class Skipped(Exception):
    """The check does not apply to this plugin; the message says why."""


def require(condition: object, message: str) -> None:
    """Raise Failed with the message unless the condition holds."""
    if not bool(condition):
        raise Failed(message)


def global_random_state() -> bytes:
    """Of torch and NumPy, to compare: nothing here may change it."""
    return torch.get_rng_state().numpy().tobytes() + pickle.dumps(np.random.get_state())  # noqa: NPY002


def derivative_error(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest relative error of a gradient of `function` [B, …] → [B], against the best of four differences."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    require(torch.isfinite(gradient).all(), "the gradient is not finite.")
    # along the gradient the slope is largest, so float32 resolves it best
    direction = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *(1,) * (x.ndim - 1))
    slope, errors = (gradient * direction).flatten(1).sum(1), []
    for step in (0.3, 0.1, 0.03, 0.01):
        with torch.no_grad():
            difference = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        errors.append(float(((difference - slope).abs() / slope.abs().clamp(min=1e-6)).max()))
    return min(errors)
