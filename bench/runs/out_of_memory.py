"""The advice when memory ran out: where, with which sizes, and what to lower."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import OutOfMemoryError
from bench.models.catalogue import is_analytic, ships
from bench.models.precision import network_dtype
from bench.runs.estimate import blueprint, estimate_memory, with_batches
from bench.runtime import memory, processes
from bench.settings import RunConfig
from bench.training import checkpoint

GRADIENT = {"losses", "backward"}  # phases that hold tensors for a backward pass
BY_MICRO_BATCH, BY_SAMPLE_BATCH = GRADIENT | {"reward", "features"}, {"rollout", "decode"}


@contextmanager
def explain_out_of_memory(config: RunConfig, folder: Path) -> Iterator[None]:
    """Add to an OutOfMemoryError in the block where it happened, the sizes, and the setting to lower.

    config: of the run in `folder`.
    """
    try:
        with memory.phase():
            yield
    except OutOfMemoryError as error:
        chosen = with_batches(config, processes.state().device, processes.count())
        raise OutOfMemoryError(_explanation(error, chosen, folder)) from error


def remedies(phases: tuple[str, ...], config: RunConfig) -> list[str]:
    """Assignments for `--set` that save memory in these phases and leave the run the same, the best one first."""
    at, model = set(phases), config.model
    name = "micro_batch" if at & BY_MICRO_BATCH else "sample_batch" if at & BY_SAMPLE_BATCH else None
    rows = getattr(config.train, name) if name else 1
    assignments = [f"train.{name}={rows // 2}"] if rows > 1 else []
    if is_analytic(model.name):
        return assignments
    if at & GRADIENT and not model.checkpointing:
        assignments.append("model.checkpointing=true")
    if "decode" in at and rows > 1 and not model.vae_slicing:  # a single image cannot be sliced
        assignments.append("model.vae_slicing=true")
    if not (model.offload or ships(model.name)):  # the text encoders of those that ship are small
        assignments.append("model.offload=true")
    if processes.count() > 1 and model.finetune == "lora" and not (model.shard or model.quantize or model.compile):
        assignments.append("model.shard=true")
    return assignments


def _explanation(error: OutOfMemoryError, config: RunConfig, folder: Path) -> str:
    where = f" in {'/'.join(error.phases)}" if error.phases else ""
    last = checkpoint.newest(folder / "checkpoints")
    if ways := remedies(error.phases, config):
        first, *others = (f"--set {way}" for way in ways)
        alternative = f" (or {', or '.join(others)})" if others else ""
        advice = f"Give the same command with {first}{alternative}: it is the same run and "
        advice += f"resumes from the last checkpoint, {last}, which is good." if last else "has no checkpoint yet."
    else:
        advice = (
            "No setting is left that saves memory here and keeps the run the same: use a model.dtype of 16 bits, "
            "model.quantize, a smaller model or adapter, fewer evaluation.rewards, or a device with more memory. "
            f"Last good checkpoint: {last or 'none'}."
        )
    return f"{error}{where}; {', '.join(_facts(config))}. {advice}"


def _facts(config: RunConfig) -> Iterator[str]:
    """The settings in use, the estimate, and the device's free memory."""
    train, model, device = config.train, config.model, processes.state().device
    yield f"train.micro_batch = {train.micro_batch}, train.sample_batch = {train.sample_batch}"
    if not is_analytic(model.name):
        for name in ("checkpointing", "vae_slicing", "offload", "shard"):
            yield f"model.{name} = {str(getattr(model, name)).lower()}"
    with contextlib.suppress(Exception):  # an error in these extra facts must not hide the real one
        if pipeline := blueprint(config):
            yield f"latents {'×'.join(map(str, pipeline.spec.latent_shape))}"
        if estimate := estimate_memory(config, network_dtype(model, device), processes.count()):
            parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in estimate.items())
            yield f"estimated {sum(estimate.values()) / 2**30:.1f} GiB ({parts})"
    with contextlib.suppress(Exception):
        if sizes := memory.available(device):
            free, total = sizes
            yield f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free on {device}"
