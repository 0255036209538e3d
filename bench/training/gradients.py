"""The gradients of an update: summed over the processes, clipped, and checked."""

import math

import torch
from torch import Tensor, nn

from bench.errors import NonFiniteError
from bench.runtime import processes

Parameters = dict[str, list[nn.Parameter]]  # by network: "policy", and the method's extra networks


def clip_gradients(parameters: Parameters, largest: float | None) -> dict[str, Tensor]:
    """Sum the gradients over the processes and clip each network's to the norm `largest`.

    Returns the norms before clipping as `gradient_norm/<network>`, scalars still on the device.
    """
    norms = {}
    for name, group in parameters.items():
        _sum_over_processes(group)
        norm = torch.nn.utils.clip_grad_norm_(group, math.inf if largest is None else largest)
        norms[f"gradient_norm/{name}"] = norm
    return norms


def require_finite(parameters: Parameters, norms: dict[str, float]) -> None:
    """Raise NonFiniteError if the gradient of a network is not finite."""
    for name in parameters:
        if not math.isfinite(norms[f"gradient_norm/{name}"]):
            raise NonFiniteError(f"the gradient of {name!r} is not finite")


def _sum_over_processes(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the processes as one flat vector, with zeros where a process has none.

    A gradient that no process has stays None: the optimiser treats None and zero differently.
    """
    if processes.count() == 1:
        return
    present = processes.add(torch.tensor([int(p.grad is not None) for p in parameters]))
    used = [p for p, number in zip(parameters, present.tolist(), strict=True) if number]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    for p, total in zip(used, processes.add(flat).split([p.numel() for p in used]), strict=True):
        p.grad = total.view_as(p).clone()
