"""Relative trajectory balance (Venkatraman et al., "Amortizing Intractable Inference in Diffusion Models for Vision,
Language, and Control", NeurIPS 2024)."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import nn

from bench import Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory, gaussian_log_prob


class RTBConfig(Config):
    """Options of relative trajectory balance."""

    channels: list[int] = Field([64, 128, 256, 256], description="widths of the network behind log Z_φ")


class RTB(Method):
    """`(log Z_φ(c) + Σ_k [log p_θ − log p_#](z_{k+1}|z_k) − β r(x))²`, densities summed; the target is `p_# exp(βr)`.

    Every step of a trajectory enters its loss, so a micro-batch holds whole trajectories, at least one. `log Z_φ` is
    the sum over elements of a latent network at the zero latent, a function of the prompt alone. The noise `z_0` is not
    tilted, so at the best policy the residual keeps a small variance.
    """

    Config = RTBConfig
    needs = Needs(rewards=True, density=True)
    recipe = {"optimizer.lr": 1e-4, "optimizer.networks.log_z.lr": 1e-2}
    config: RTBConfig

    def tilted(self) -> bool:
        """Always."""
        return True

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """`log Z_φ`, zero at the start."""
        return {"log_z": model.latent_network(self.config.channels)}

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over whole trajectories."""
        count = core.kernel.steps
        for rows in data.split(max(1, core.micro_batch // count)):
            steps = torch.arange(count).expand(len(rows), count)
            (part,) = rows.transitions(steps, steps.numel())
            output = core.predict(part.z, part.k, part.conditioning)
            prior_output = core.predict(part.z, part.k, part.conditioning, prior=True)
            std = core.kernel.std(part.k, part.z)
            log_prob, prior_log_prob = (
                gaussian_log_prob(part.z_next, core.kernel.mean(part.z, e, part.k), std) for e in (output, prior_output)
            )
            log_ratio = (log_prob - prior_log_prob).view(count, len(rows)).sum(0)
            last = rows.latents[:, -1]
            log_z = core.network("log_z", torch.zeros_like(last), count, rows.conditioning).flatten(1).sum(1)
            residual = log_z + log_ratio - core.beta * rows.rewards
            yield Loss(residual**2, {"log_z": log_z.detach(), "log_ratio": log_ratio.detach()})
