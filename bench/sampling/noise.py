"""Named noise: the same sample sees the same noise in every method, process count and resumed run.

Noise is a pure function of its name: a counter-based generator (Philox 4x64) is keyed with a 128-bit hash of
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
Purpose = Literal["train", "evaluate", "reference", "floor", "target", "renoise", "select", "weights"]


def generator(seed: int, purpose: Purpose, *name: str | int, step: int = 0) -> np.random.Generator:
    """A NumPy generator that depends on nothing but its arguments."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *name), counter=[0, 0, 0, step]))


def key(seed: int, purpose: Purpose, *name: str | int) -> int:
    """The 128-bit key of a name, as `np.random.Philox(key=…)` takes it."""
    text = "\x1f".join(map(str, (VERSION, seed, purpose, *name)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class Noise:
    """Standard normal noise for a batch of named samples.

    `samples` holds one (prompt, index) pair per row. `noise(step, shape)` returns float32 `[B, *shape]` on the CPU;
    step 0 is the initial latent `z_0`, step k+1 the noise that enters `z_{k+1}`. Row i equals
    `generator(seed, purpose, *samples[i], step=step).standard_normal(shape, np.float32)`.
    """

    def __init__(self, seed: int, purpose: Purpose, samples: Sequence[tuple[str, int]]):
        numbers = (key(seed, purpose, *name) for name in samples)
        self._keys = [np.array([number % 2**64, number >> 64], np.uint64) for number in numbers]  # the low word first
        self._bits = np.random.Philox(key=0)
        self._state = self._bits.state  # setting it is six times as fast as a new generator for each row

    def __call__(self, step: int, shape: Sequence[int]) -> torch.Tensor:
        rows = np.empty((len(self._keys), *shape), np.float32)
        numbers = np.random.Generator(self._bits)
        for row, words in zip(rows, self._keys, strict=True):
            self._state["state"] = {"counter": np.array([0, 0, 0, step], np.uint64), "key": words}
            self._bits.state = self._state
            numbers.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(rows)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, without waiting for what is queued there."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Seed weight initialisers in the block with (seed, name); the global random state is restored after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator(seed, "weights", *name).integers(2**32)))
        yield
