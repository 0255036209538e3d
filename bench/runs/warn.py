"""Warnings about a setting, given when a run starts."""

import logging
from typing import Any

from bench.sampling.kernel import Kernel

ONE_STEP = 0.9  # a share of all weights; the default grid of Stable Diffusion 1.5 with 20 steps has 0.73
log = logging.getLogger(__name__)


def warn_of_cut(prompts: list[str], tokenizer: Any) -> None:
    """Warn of prompts that are longer than the text encoder reads."""
    limit = tokenizer.model_max_length
    candidates = [prompt for prompt in prompts if len(prompt.encode()) > limit - 3]  # a token is at least a byte
    if candidates and (long := sum(len(t) > limit for t in tokenizer(candidates, verbose=False).input_ids)):
        log.warning("%d of %d prompts are longer than the %d tokens that the encoder reads", long, len(prompts), limit)


def warn_of_one_step(kernel: Kernel) -> None:
    """Warn if nearly all of the weight in a loss of transition densities lies in one step of the sampler."""
    step, share = kernel.largest_weight()
    if share > ONE_STEP:
        log.warning(
            "step %d of %d holds %.0f %% of the sampler's weights (∂μ/∂o / σ)²: the other steps learn little, "
            "at a high path_kl. Leave more noise in the finished sample: sampler.spacing=logsnr with "
            "sampler.final_noise=0.06 for a flow, sampler.final_alpha=0.99 for a diffusion",
            step + 1,
            kernel.steps,
            100 * share,
        )
