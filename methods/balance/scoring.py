"""Rewards of the clean predictions at the states of a trajectory, which the scalar flow of detailed balance holds."""

import torch
from torch import Tensor

from bench import Core, Trajectory, Transitions


def predict_and_score(core: Core, part: Transitions) -> tuple[Tensor, Tensor]:
    """The policy's output at z_k [n, *latent], and the reward `r(x̂_k)` [n] of its clean prediction, in one pass.

    x̂_k is the conditional prediction alone, without guidance; the rewards have no gradient.
    """
    output, conditional = core.model.predict_both(part.z, core.kernel.timesteps[part.k], part.conditioning)
    with torch.no_grad():
        return output, core.reward(core.kernel.clean(part.z, conditional, part.k), part.prompts)


def score_ends(core: Core, data: Trajectory, steps: Tensor) -> Tensor:
    """Rewards `r(x̂_k)` [B, K+1] of the states where a transition at `steps` ends and none begins; NaN elsewhere.

    Each as `predict_and_score` gives it; at k = K the reward of the finished sample. steps: long [B, S], on the CPU.
    """
    rewards = data.latents.new_full((len(data), core.kernel.steps + 1), float("nan"))
    begins = torch.zeros(len(data), core.kernel.steps + 1, dtype=torch.bool).scatter_(1, steps, True)
    ends = begins.scatter(1, steps + 1, True) & ~begins
    for states in ends.nonzero().split(core.micro_batch):
        row, k = states.unbind(1)
        part = data.transitions_at(row, k - 1)
        clean, inner = part.z_next, part.unfinished
        with torch.no_grad():
            if len(inner):
                z, k_next = part.z_next[inner], part.k[inner] + 1
                output = core.predict(z, k_next, part.conditioning[inner], guided=False)
                clean = clean.index_copy(0, inner, core.kernel.clean(z, output, k_next))
            rewards[part.row, part.k + 1] = core.reward(clean, part.prompts)
    return rewards
