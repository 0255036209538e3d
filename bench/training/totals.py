"""What is logged of an update: sums of losses and metrics, kept on the device and read once."""

import torch
from torch import Tensor

from bench.errors import NonFiniteError
from bench.method import Loss
from bench.runtime import processes

Totals = dict[str, tuple[float, int]]  # name → sum, and the number of rows in it


class LossTotals:
    """Sums over an update's micro-losses, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.finite: list[tuple[Tensor, list[str]]] = []  # of each micro-loss, and its prompts

    def add(self, loss: Loss, prompts: list[str]) -> None:
        """Count a micro-loss of trajectories with these prompts."""
        self.finite.append((torch.isfinite(loss.values).all(), prompts))
        for name, value in ({"loss": loss.values} | loss.metrics).items():
            amount = value.detach().sum().double()
            self.sums[name] = self.sums[name] + amount if name in self.sums else amount
            self.rows[name] = self.rows.get(name, 0) + value.numel()

    def read(self, scalars: dict[str, Tensor]) -> tuple[Totals, dict[str, float]]:
        """The totals and some more scalars as numbers; the device waits once.

        Raises NonFiniteError, with its prompts, for a loss that is not finite.
        """
        flags = [finite for finite, _ in self.finite]
        tensors = [*flags, *self.sums.values(), *scalars.values()]
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        numbers = torch.stack([tensor.to(device, torch.float64) for tensor in tensors]).tolist()
        finite, sums, rest = numbers[: len(flags)], numbers[len(flags) :], numbers[len(flags) + len(self.sums) :]
        if bad := {p for ok, (_, prompts) in zip(finite, self.finite, strict=True) if not ok for p in prompts}:
            raise NonFiniteError(f"the loss is not finite; its prompts: {sorted(bad)[:5]}")
        totals = {name: (total, self.rows[name]) for name, total in zip(self.sums, sums, strict=False)}
        return totals, dict(zip(scalars, rest, strict=True))


def averages(totals: Totals, trajectories: int) -> dict[str, float]:
    """Means over the totals of all processes: of the loss over the update's trajectories, of a metric over its rows."""
    everyone = processes.gather(totals)
    means = {}
    for name in dict.fromkeys(name for one in everyone for name in one):
        sums, rows = zip(*(one.get(name, (0.0, 0)) for one in everyone), strict=True)
        if count := trajectories if name == "loss" else sum(rows):
            means[name] = sum(sums) / count
    return means
