"""What a large prompt set costs: `python -m tests.runs.growth` prints the table of docs/contract.md (a few minutes)."""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bench.config import resolve
from bench.runs.build import build_core, build_method
from bench.runs.contents import contents
from bench.runs.preflight import preflight
from bench.runs.warn import warn_of_cut
from bench.training import checkpoint
from bench.training.trainer import Trainer

SIZES = (100, 10_000, 100_000)
SETTINGS = ("sampler.steps=2", "train.prompts_per_round=16", "train.samples_per_prompt=2")


def measure(count: int, folder: Path) -> list[float]:
    """Seconds of the start (files read, split, hashed, cut prompts counted), of a round after the first, and of a
    checkpoint when every prompt has been seen, and its size in MB; on the embedded prior, with statistics per prompt.
    """
    path = folder / f"{count}.txt"
    path.write_text("\n".join(f"cat {i}" for i in range(count)))
    config = resolve("ddpo", overrides={"prompts.name": str(path)}, assignments=list(SETTINGS))
    start = time.perf_counter()
    prompts = preflight(config)
    contents(config, prompts)
    whole = build_core(config)
    warn_of_cut(prompts.all, whole.model.pipeline.tokenizer)
    method = build_method(config)
    trainer = Trainer(whole, method, prompts.train, config.train, config.optimizer, folder / str(count))
    seconds = [time.perf_counter() - start]
    trainer.step()  # the first round also warms up
    while trainer.part:
        trainer.step()
    start = time.perf_counter()
    for _ in range(config.train.updates_per_round):
        trainer.step()
    seconds.append(time.perf_counter() - start)
    for _ in range(method.config.buffer):
        method.statistics.advantages(prompts.train, torch.zeros(len(prompts.train)))
    start = time.perf_counter()
    size = checkpoint.save(folder / str(count), 1, trainer.state_dict()).stat().st_size
    return [*seconds, time.perf_counter() - start, size / 1e6]


if __name__ == "__main__":
    print("| prompts | start [s] | round [s] | checkpoint [s] | checkpoint [MB] |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for count in SIZES:
            print(f"| {count:,} | " + " | ".join(f"{value:.3g}" for value in measure(count, Path(place))) + " |")
