"""Which settings save memory, how much by the estimate, and the cheapest of them with which a run fits a GPU."""

import re
from collections.abc import Iterator

from bench.errors import BenchError
from bench.models import catalogue
from bench.models.precision import network_dtype
from bench.runs.estimate import SHARE, memory_of, model_shapes
from bench.settings import ModelConfig, RunConfig

GIB = 2**30
# What slows a run down least comes first. Each is on top of those before it, but that 4 bits take the place of 8.
STEPS = (("checkpointing", True), ("offload", True), ("quantize", "int8"), ("quantize", "nf4"))


def gpu_bytes(text: str) -> int:
    """Bytes of a GPU's memory from `24gb`, `24GiB` or `24`, which all are GiB. Raises BenchError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise BenchError(f"--gpu-memory {text}: give a size in GiB, such as 24gb.")
    return int(float(match[1]) * GIB)


def combinations(config: RunConfig) -> dict[str, int]:
    """Bytes on a GPU by the settings that are added, `KEY=VALUE …`, for one row at a time; nothing without an estimate.

    The first has none. A setting that the configuration has already, or that does not fit it, is left out.
    """
    one_row = {"train": config.train.model_copy(update={"micro_batch": 1, "sample_batch": 1})}
    shapes = model_shapes(config, network_dtype(config.model, "cuda"))
    if shapes is None:
        return {}
    added = {text: config.model_copy(update=one_row | {"model": model}) for text, model in _models(config)}
    return {text: sum(memory_of(one, shapes).values()) for text, one in added.items()}


def _models(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    model, chosen = config.model, {}
    yield "", model
    quantizable = model.finetune == "lora" and not model.lora.use_dora and model.quantize is None
    for key, value in STEPS:
        if (key == "quantize" and not quantizable) or getattr(model, key) is True:
            continue
        chosen[key] = value
        text = " ".join(f"model.{name}={str(one).lower()}" for name, one in chosen.items())
        yield text, model.model_copy(update=chosen)


def combinations_text(config: RunConfig, total: int | None) -> list[str]:
    """Lines for a plan: the estimates, and which settings to give for a GPU of `total` bytes; None: an unknown one.

    Nothing for a model that ships, which fits everywhere.
    """
    if catalogue.ships(config.model.name) or not (found := combinations(config)):
        return []
    lines = ["estimated memory on a GPU for one row at a time, by what is added (the slower the further down):"]
    lines += [f"  {size / GIB:6.1f} GiB  {text or 'as it is'}" for text, size in found.items()]
    if total is None:
        return [*lines, "--gpu-memory 24gb says which of these a GPU of that size needs."]
    usable = f"{SHARE * total / GIB:.1f} of {total / GIB:.1f} GiB may be used"
    fitting = next((text for text, size in found.items() if size <= SHARE * total), None)
    if fitting is None:
        return [*lines, f"None of these fits this GPU ({usable}): take a smaller model, or fewer evaluation.rewards."]
    if not fitting:
        return [*lines, f"It fits this GPU as it is ({usable})."]
    options = " ".join(f"--set {assignment}" for assignment in fitting.split())
    return [*lines, f"The cheapest that fits this GPU ({usable}): {options}"]
