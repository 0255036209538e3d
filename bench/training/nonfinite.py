"""Where to look when a reward, loss or gradient is not finite."""

import torch

from bench.core import Core
from bench.errors import BenchError
from bench.reward import score

PRIOR_NOT_FINITE = (
    "The prior's own samples are not finite, so training did not cause this: check the model's weights, or use "
    "model.dtype=float32."
)
REMEDY = "Lower optimizer.lr or reward.beta, or use model.dtype=float32."


def nonfinite_advice(core: Core, prompts: list[str]) -> str:
    """A sentence for the user: are the prior's samples of these prompts, and their rewards, finite before training?

    Samples and scores a few of them; if that fails, says what helps in most cases.
    """
    names = [(prompt, index) for prompt in dict.fromkeys(prompts[:4]) for index in range(2)]
    try:
        with torch.no_grad():
            z = core.rollout(core.batch(names), prior=True).latents[:, -1]
            rewards = score(core.reward_model, core.reward_name, core.model.decode(z), [p for p, _ in names])
    except BenchError:
        return REMEDY
    if not bool(torch.isfinite(z).all()):
        return PRIOR_NOT_FINITE
    if not bool(torch.isfinite(rewards).all()):
        return (
            f"The reward {core.reward_name!r} is not finite on the prior's own samples either: repair it; no setting "
            "will help."
        )
    return f"The prior's own samples are finite. {REMEDY}"
