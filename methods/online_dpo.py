"""Online DPO: Diffusion-DPO (Wallace et al., 2023) on samples of the policy itself."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench import NFE, Batch, Config, Core, Loss, Method, Needs, Noised, Strength, Trajectory, best_and_worst


class OnlineDPOConfig(Config):
    """Options of online DPO."""

    strength: float = Field(5000.0, gt=0, description="β of DPO; published: 5000, and about 100 online on flows")
    fraction: float = Field(0.1, gt=0, le=1, description="noise levels per sample and update, over K")


class OnlineDPO(Method):
    """Online DPO: Diffusion-DPO on the best and the worst of each group.

    The loss of a winner w and a loser l, noised alike to `z = αx + sε` with one ε, is

        −log σ(−β/2 [(‖o_θ − u‖² − ‖o_# − u‖²)_w − (‖o_θ − u‖² − ‖o_# − u‖²)_l])

    where u is the output that would give x back and ‖·‖² the mean over elements. They are the best and the worst of the
    round's samples of a prompt; each sample of the group names one draw of the noise and its level. A group of equal
    rewards has no pair: it is logged as `tied` and has a loss of zero.

    Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", 2023, on samples of the policy
    itself: https://arxiv.org/abs/2311.12908
    """

    Config = OnlineDPOConfig
    needs = Needs(rewards=True)
    recipe = {"optimizer.lr": 3e-4, "optimizer.weight_decay": 1e-4}
    strength = Strength("method.strength", (50.0, 250.0, 1000.0, 5000.0))
    config: OnlineDPOConfig

    def unfit(self, steps: int, group: int) -> str | None:
        """A group of one has no pair."""
        return "a winner and a loser need train.samples_per_prompt ≥ 2" if group < 2 else None

    def prepare(self, core: Core, data: Trajectory) -> Trajectory:
        """Put each row's pair in place of its latents, loser then winner; advantages are 1, or 0 without a pair."""
        best, worst = best_and_worst(data.prompts, data.rewards)
        finished = data.latents[:, -1]
        differ = (data.rewards[best] != data.rewards[worst]).to(data.rewards)
        return replace(data, latents=torch.stack([finished[worst], finished[best]], 1), advantages=differ)

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The sampler's steps [B, S] whose noise levels the pairs get."""
        return core.choose_steps(data, self.config.fraction, last="like any")

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over pairs; a pair is two rows of the network."""
        steps = self.steps(core, data)
        for winners in core.noised(data, steps, max(1, core.micro_batch // 2)):
            losers = data[winners.row % len(data)].latents[:, 0]
            values, metrics = self.pair_losses(core, winners, losers)
            yield Loss(values / steps.shape[1], metrics)

    def pair_losses(self, core: Core, winners: Noised, losers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [n] of each pair, and what is logged of it [n]; losers: clean latents [n, *latent]."""
        z = torch.cat([winners.z, core.kernel.noised(losers, winners.noise, winners.k)])
        target = torch.cat([winners.target, core.kernel.target(losers, winners.noise, winners.k)])
        k, text = torch.cat([winners.k] * 2), winners.conditioning.join([winners.conditioning] * 2)
        errors, prior_errors = (
            (core.predict(z, k, text, prior=prior) - target).square().flatten(1).mean(1) for prior in (False, True)
        )
        winner, loser = (errors - prior_errors).chunk(2)
        preference = -self.config.strength / 2 * (winner - loser)
        metrics = {"tied": 1 - winners.advantages, "accuracy": (preference.detach() > 0).float()}
        return -logsigmoid(preference) * winners.advantages, metrics

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """Policy and prior at a noised winner and loser; the policy alone has a gradient."""
        states = 2 * self.steps(core, batch).numel()
        return NFE(core.kernel.steps * len(batch), 2 * states, states)
