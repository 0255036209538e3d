"""The frozen weights of a denoiser, of which every process keeps a part: PyTorch's FSDP2.

A block's weights are gathered when the block is called, forward or backward, and freed afterwards. So all processes
have to call the denoiser equally often and in the same order: see `bench.runtime.processes.turns`.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.errors import BenchError
from bench.runtime import processes


def require_fully_shard() -> None:
    """Raise BenchError where PyTorch cannot shard a network around parameters that stay whole."""
    from torch.distributed.fsdp import fully_shard  # slow to import, and few runs share weights

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise BenchError(f"model.shard needs a newer PyTorch than {torch.__version__}: update it, or leave it out.")


def shard(network: Any, device: torch.device) -> None:
    """Keep this process's part of the frozen weights, on the device; the trained ones stay whole and where they are.

    A block at a time goes to the device in full, so the network need not fit there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count(),))
    trained = {p for p in network.parameters() if p.requires_grad}
    for _, unit in reversed(list(_units(network))):  # what is inside before what is around it
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def largest_gathered(network: nn.Module) -> int:
    """Frozen numbers that are whole at a time, at most: a unit's and those of the units around it."""
    units = [name for name, _ in _units(network)]
    own = dict.fromkeys(units, 0)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            own[max((unit for unit in units if _within(name, unit)), key=len)] += parameter.numel()
    return max(sum(own[around] for around in units if _within(unit, around)) for unit in units)


def _units(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is gathered as one, by name: the blocks, as diffusers lists them, and the network, for what is in none."""
    blocks = getattr(network, "_no_split_modules", None) or ()
    for name, module in network.named_modules():
        if module is network or type(module).__name__ in blocks:
            yield name, module


def _within(name: str, unit: str) -> bool:
    return not unit or name == unit or name.startswith(f"{unit}.")
