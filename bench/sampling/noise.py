"""Named noise: the same sample sees the same noise in every method, process count and resumed run.

Noise is a pure function of its name. A counter-based generator (Philox 4x64) is keyed with a 128-bit hash of
(version, seed, purpose, name), and the sampling step fills the counter's highest word, so the streams of two steps
never overlap. Nothing here reads or writes global random state.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

VERSION = 1
Purpose = Literal["train", "evaluate", "reference", "floor", "renoise", "select", "weights"]


def generator(seed: int, purpose: Purpose, *name: str | int, step: int = 0) -> np.random.Generator:
    """A NumPy generator that depends on nothing but its arguments."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, *name), counter=[0, 0, 0, step]))


def _key(seed: int, purpose: Purpose, *name: str | int) -> np.ndarray:
    """The 128-bit key of a name, as two words."""
    text = "\x1f".join(map(str, (VERSION, seed, purpose, *name)))
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


class Noise:
    """Standard normal noise for a batch of named samples.

    `samples` holds one (prompt, index) pair per row. `noise(step, shape)` returns float32 `[B, *shape]` on the CPU;
    step 0 is the initial latent `z_0`, step k+1 the noise that enters `z_{k+1}`. Row i equals
    `generator(seed, purpose, *samples[i], step=step).standard_normal(shape, np.float32)`.
    """

    def __init__(self, seed: int, purpose: Purpose, samples: Sequence[tuple[str, int]]):
        self._keys = [_key(seed, purpose, *name) for name in samples]
        self._bits = np.random.Philox(key=0)
        self._state = self._bits.state  # a new generator a row would cost six times as much as setting this one's

    def __call__(self, step: int, shape: Sequence[int]) -> torch.Tensor:
        rows = np.empty((len(self._keys), *shape), np.float32)
        numbers = np.random.Generator(self._bits)
        for row, key in zip(rows, self._keys, strict=True):
            self._state["state"] = {"counter": np.array([0, 0, 0, step], np.uint64), "key": key}
            self._bits.state = self._state
            numbers.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(rows)


def on_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows on `device`, where a GPU does not stop for the copy: it comes from pinned memory."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Make weight initialisers inside the block a function of (seed, name); the global state is put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator(seed, "weights", *name).integers(2**32)))
        yield
