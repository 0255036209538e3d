"""Warnings about a setting, given when a run starts."""

import logging
from typing import Any

from bench.method import Method
from bench.sampling.kernel import Kernel

ONE_STEP = 0.9  # a share of all weights; the default grid of Stable Diffusion 1.5 with 20 steps has 0.73
LEAK = 0.05  # a share of the variance; the suites have 0.008 or less
log = logging.getLogger(__name__)


def warn_of_stages(method: Method, run: int) -> None:
    """Warn if a run of so many rounds ends before the last stage of one of the method's copies."""
    for name, copy in method.copies().items():
        if copy.stages and run <= (copy.stages - 1) * (rounds := copy.interval(run) or 0):
            log.warning(
                "the run has %d rounds, and the %d stages after which %r follows have %d each: it ends before the "
                "last stage",
                run, copy.stages, name, rounds,
            )  # fmt: skip


def warn_of_cut(prompts: list[str], tokenizer: Any) -> None:
    """Warn of prompts that are longer than the text encoder reads."""
    limit = tokenizer.model_max_length
    candidates = [prompt for prompt in prompts if len(prompt.encode()) > limit - 3]  # a token is at least a byte
    if candidates and (long := sum(len(t) > limit for t in tokenizer(candidates, verbose=False).input_ids)):
        log.warning("%d of %d prompts are longer than the %d tokens that the encoder reads", long, len(prompts), limit)


def warn_of_first_noise(kernel: Kernel) -> None:
    """Warn if the sampler is far from memoryless."""
    if (share := kernel.leak()) > LEAK:
        log.warning(
            "the first noise decides %.0f %% of a finished sample's variance (for data of unit variance), and the "
            "method tilts sampling steps alone: that share stays as it is. Use sampler.rule=ddim with sampler.eta=1",
            100 * share,
        )


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
