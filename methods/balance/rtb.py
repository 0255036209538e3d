"""Relative trajectory balance."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import NFE, TILT, Batch, Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory, gaussian_log_prob


class RTBConfig(Config):
    """Options of relative trajectory balance."""

    channels: list[int] = Field([64, 128, 256, 256], description="widths of the network behind log Z_φ")


class RTB(Method):
    """Relative trajectory balance with a learned log Z; it samples from p_# exp(βr).

    The loss of a trajectory is

        ( log Z_φ(c) + Σ_k [ log p_θ(z_{k+1}|z_k) − log p_#(z_{k+1}|z_k) ] − β r(z_K, c) )²

    `log Z_φ` depends on the prompt c alone: it is the sum over the elements of a network's output at the zero latent.
    No policy changes the distribution of the noise `z_0`, so at the best policy the residual keeps a small variance.

    Venkatraman et al., "Amortizing Intractable Inference in Diffusion Models for Vision, Language, and Control",
    NeurIPS 2024, https://arxiv.org/abs/2405.20971
    """

    Config = RTBConfig
    needs = Needs(rewards=True, density=True, memoryless=True)
    strength = TILT
    recipe = {"optimizer.lr": 1e-4, "optimizer.networks.log_z.lr": 1e-2}
    config: RTBConfig

    def tilted(self) -> bool:
        """Always."""
        return True

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """`log Z_φ`, zero at the start."""
        return {"log_z": model.latent_network(self.config.channels)}

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """One micro-loss per micro-batch of whole trajectories, at least one."""
        for rows in data.split(max(1, core.micro_batch // core.kernel.steps)):
            log_ratio = log_density(core, rows) - log_density(core, rows, prior=True)
            zero = torch.zeros_like(rows.latents[:, -1])
            log_z = core.network("log_z", zero, core.kernel.steps, rows.conditioning).flatten(1).sum(1)
            residual = log_z + log_ratio - core.beta * rows.rewards
            yield Loss(residual**2, {"log_z": log_z.detach(), "log_ratio": log_ratio.detach()})

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The policy and the prior at every state."""
        states = core.kernel.steps * len(batch)
        return NFE(rollout=states, forward=2 * states, backward=states)


def log_density(core: Core, data: Trajectory, prior: bool = False) -> Tensor:
    """`Σ_k log p(z_{k+1}|z_k)` of whole trajectories under the policy, or under the prior.

    Returns float64 [B], because the sum is long; all B·K transitions are one micro-batch.
    """
    steps = core.kernel.steps
    (part,) = data.transitions(torch.arange(steps).expand(len(data), steps), steps * len(data))
    output = core.predict(part.z, part.k, part.conditioning, prior=prior)
    mean, std = core.kernel.mean(part.z, output, part.k), core.kernel.std(part.k, part.z)
    log_prob = gaussian_log_prob(part.z_next.double(), mean.double(), std.double())
    return log_prob.view(steps, len(data)).sum(0)
