"""Models by name, local folder or hub id."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.errors import BenchError, did_you_mean

if TYPE_CHECKING:
    from bench.config import ModelConfig, SamplerConfig
    from bench.kernel import Kernel
    from bench.models.base import DiffusionModel

NAMED = {
    "emoji": "the embedded prior: 32-pixel emoji in three drawing styles",
    "ring": "eight 2-D Gaussians on a circle, exact score; a run takes seconds and the target is known",
    "gaussian": "one 2-D Gaussian, exact score; the finetuned optimum is known in closed form",
}
ANALYTIC = {"ring": "RingModel", "gaussian": "GaussianModel"}  # have no weights; their samples are points


def locate(name: str) -> Path | None:
    """The folder of a model's weights, which may be the local cache of a hub repository; None for an analytic model.

    A hub id that is not cached is downloaded if the hub can be reached. Raises BenchError, within seconds, for an
    unknown name or for weights that are missing while offline; nothing is loaded here.
    """
    if name in ANALYTIC:
        return None
    if name == "emoji":
        from bench.models import emoji

        return emoji.path()
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise BenchError(f"the folder {name!r} is no diffusers pipeline: it has no model_index.json.")
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        known = did_you_mean(name, NAMED)
        raise BenchError(f"unknown model {name!r}{known} Or give a local folder or a hub id (org/name).")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, get_session, snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model_index.json")
    if isinstance(cached, str):
        return Path(cached).parent
    reachable = not constants.HF_HUB_OFFLINE
    if reachable:
        try:  # one short probe: left to itself, the hub client retries for half a minute
            get_session().head(constants.ENDPOINT, timeout=3)
        except Exception:  # whatever the HTTP client raises, the meaning is the same
            reachable = False
    if not reachable:
        raise BenchError(
            f"the weights of {name!r} are not in {os.path.relpath(constants.HF_HUB_CACHE)} and the hub cannot be "
            f"reached: run `hf download {name}` where there is a network and copy the cache here, give a local folder "
            "with --model, or use the embedded model (--model emoji)."
        )
    return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx*"]))


def load_model(
    config: "ModelConfig", sampler: "SamplerConfig", *, device: torch.device | str = "cpu", seed: int = 0
) -> "DiffusionModel":
    """The configured model on `device`, its adapter freshly initialised from `seed`."""
    if config.name in ANALYTIC:
        from bench.models import analytic

        return getattr(analytic, ANALYTIC[config.name])(device=device, seed=seed)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from bench.models.pipeline import LatentDiffusion

    for library in (diffusers_logging, transformers_logging):  # their progress bars would break ours
        library.disable_progress_bar()
        library.set_verbosity_error()
    auto = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return LatentDiffusion(
        locate(config.name),
        guidance=sampler.guidance,
        dtype=getattr(torch, auto if config.dtype == "auto" else config.dtype),
        device=device,
        finetune=config.finetune,
        lora_rank=config.lora_rank,
        checkpointing=config.checkpointing,
        seed=seed,
    )


def make_kernel(model: "DiffusionModel", sampler: "SamplerConfig") -> "Kernel":
    """The configured transition kernel over the model's noise schedule."""
    from bench.kernel import ddim_kernel

    return ddim_kernel(
        model.alphas_cumprod,
        sampler.steps,
        eta=sampler.eta,
        spacing=sampler.spacing,
        steps_offset=model.steps_offset,
        final_alpha=model.final_alpha if sampler.final_alpha is None else sampler.final_alpha,
    )
