"""Which settings save memory, how much by the estimate, and the cheapest of them with which a run fits a GPU."""

import re
from collections.abc import Iterator

from bench.errors import BenchError
from bench.models import catalogue
from bench.models.precision import network_dtype
from bench.runs.estimate import SHARE, memory_of, model_shapes
from bench.settings import ModelConfig, RunConfig

GIB = 2**30
# What slows a run down least comes first, and last what makes another prior. Each is on top of those before it, but
# that 4 bits take the place of 8, and both that of a share of the weights.
STEPS = (("checkpointing", True), ("offload", True), ("shard", True), ("quantize", "int8"), ("quantize", "nf4"))


def gpu_bytes(text: str) -> int:
    """Bytes of a GPU's memory from `24gb`, `24GiB` or `24`, which all are GiB. Raises BenchError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise BenchError(f"--gpu-memory {text}: give a size in GiB, such as 24gb.")
    return int(float(match[1]) * GIB)


def combinations(config: RunConfig, processes: int = 1) -> dict[str, int]:
    """Bytes on a GPU by the settings that are added, `KEY=VALUE …`, for one row at a time; nothing without an estimate.

    The first has none. A setting that the configuration has already, or that does not fit it, is left out.
    processes: of the run, each with a GPU of its own.
    """
    one_row = {"train": config.train.model_copy(update={"micro_batch": 1, "sample_batch": 1})}
    shapes = model_shapes(config, network_dtype(config.model, "cuda"))
    if shapes is None:
        return {}
    models = _models(config, processes)
    added = {text: config.model_copy(update=one_row | {"model": model}) for text, model in models}
    return {text: sum(memory_of(one, shapes, processes).values()) for text, one in added.items()}


def _models(config: RunConfig, processes: int) -> Iterator[tuple[str, ModelConfig]]:
    model, chosen = config.model, dict[str, bool | str]()
    yield "", model
    frozen = model.finetune == "lora" and model.quantize is None
    fits = {
        "shard": frozen and processes > 1 and not model.compile,
        "quantize": frozen and not model.lora.use_dora and not model.shard,
    }
    for key, value in STEPS:
        if not fits.get(key, True) or getattr(model, key) is True:
            continue
        if key == "quantize":
            chosen.pop("shard", None)
        chosen[key] = value
        text = " ".join(f"model.{name}={str(one).lower()}" for name, one in chosen.items())
        yield text, model.model_copy(update=chosen)


def combinations_text(config: RunConfig, total: int | None, processes: int = 1) -> list[str]:
    """Lines for a plan: the estimates, and which settings to give for a GPU of `total` bytes; None: an unknown one.

    Nothing for a model that ships, which fits everywhere.
    """
    if catalogue.ships(config.model.name) or not (found := combinations(config, processes)):
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
