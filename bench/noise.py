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
    text = "\x1f".join(map(str, (VERSION, seed, purpose, *name)))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))


class Noise:
    """Standard normal noise for a batch of named samples.

    `samples` holds one (prompt, index) pair per row. `noise(step, shape)` returns float32 `[B, *shape]` on the CPU;
    step 0 is the initial latent `z_0`, step k+1 the noise that enters `z_{k+1}`.
    """

    def __init__(self, seed: int, purpose: Purpose, samples: Sequence[tuple[str, int]]):
        self.seed, self.purpose, self.samples = seed, purpose, list(samples)

    def __call__(self, step: int, shape: Sequence[int]) -> torch.Tensor:
        rows = [
            generator(self.seed, self.purpose, prompt, index, step=step).standard_normal(tuple(shape), np.float32)
            for prompt, index in self.samples
        ]
        return torch.from_numpy(np.stack(rows))

    def __getitem__(self, rows: slice) -> "Noise":
        return Noise(self.seed, self.purpose, self.samples[rows])


@contextmanager
def seeded(seed: int, *name: str | int) -> Iterator[None]:
    """Make weight initialisers inside the block a function of (seed, name); the global state is put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator(seed, "weights", *name).integers(2**32)))
        yield
