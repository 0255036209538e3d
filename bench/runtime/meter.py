"""Compute accounting: what a run costs."""

import ctypes
import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.runtime import memory
from bench.runtime.processes import gather

COUNTS = ("network_forwards", "network_backwards", "reward_calls", "reward_gradients")


@dataclass
class Meter:
    """Counts of one run; they survive a resume.

    network_forwards, network_backwards: NFE in rows of the denoiser's batches (a guided prediction is two rows per
        sample; recomputation by gradient checkpointing counts, because it costs time). reward_calls, reward_gradients:
        images.
    seconds: wall time by phase; phases do not nest. On a GPU it is the time between two marks in its queue, so that a
        phase does not wait for the work that it queues. peak_memory: bytes, of the device, or of the process on a CPU.
    """

    network_forwards: int = 0
    network_backwards: int = 0
    reward_calls: int = 0
    reward_gradients: int = 0
    peak_memory: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._finished: list[tuple[str, Any, Any]] = []  # phases whose marks the GPU may not have reached yet

    def watch(self, network: nn.Module) -> None:
        """Count every forward and backward row of `network` from now on."""

        # called before the pass, because a recomputation stops early
        def forward(module: nn.Module, args: tuple, options: dict) -> None:
            self.network_forwards += len(args[0] if args else options["hidden_states"])  # as diffusers names latents

        def backward(module: nn.Module, args: tuple, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            # a network that takes a list of latents gives a list, of a row each
            for tensor, rows in [(row, 1) for row in value] if isinstance(value, list) else [(value, len(value))]:
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad, rows=rows: self._backward(rows))

        network.register_forward_pre_hook(forward, with_kwargs=True)
        network.register_forward_hook(backward)

    def _backward(self, rows: int) -> None:
        self.network_backwards += rows

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[name]`; an OutOfMemoryError in it gets this name."""
        start = _mark()
        try:
            with memory.phase(name):
                yield
        finally:
            self._finished.append((name, start, _mark()))

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """A phase of which only the time counts: an evaluation is not part of a method's cost."""
        with self.phase(name), self.uncounted():
            yield

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """A block that adds nothing to the counts."""
        before = {name: getattr(self, name) for name in COUNTS}
        yield
        self.restore(before)

    def snapshot(self) -> dict:
        """The counts so far as plain numbers, with current seconds and peak memory; waits for a GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for name, start, end in self._finished:
            seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._finished.clear()
        self.peak_memory = max(self.peak_memory, peak)
        return asdict(self)

    def total(self) -> dict:
        """The counts of all processes together, the largest peak memory, and this process's seconds."""
        here = self.snapshot()
        everyone = gather(here)
        sums = {name: sum(one[name] for one in everyone) for name in COUNTS}
        return here | sums | {"peak_memory": max(one["peak_memory"] for one in everyone)}

    def restore(self, snapshot: dict) -> None:
        """Continue from a stored snapshot."""
        for name, value in snapshot.items():
            setattr(self, name, dict(value) if isinstance(value, dict) else value)


def _mark() -> Any:
    """Now: the host's clock in seconds, or an event in a GPU's queue."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def reset_peak_memory() -> None:
    """Reset the peak of memory: the device's, and on Linux that of the process (see proc(5))."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory that the C library holds on to
        Path("/proc/self/clear_refs").write_text("5", encoding="utf8")
