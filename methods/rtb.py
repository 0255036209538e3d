"""Relative trajectory balance (Venkatraman et al., "Amortizing Intractable Inference in Diffusion Models for Vision,
Language, and Control", NeurIPS 2024), and its form within a group (TMPO, arXiv 2605.10983)."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import (
    Config,
    Core,
    DiffusionModel,
    Loss,
    Method,
    Needs,
    Trajectory,
    gaussian_log_prob,
    log_softmax_by_prompt,
)


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
        for rows in data.split(max(1, core.micro_batch // core.kernel.steps)):
            log_ratio = log_density(core, rows) - log_density(core, rows, prior=True)
            last = rows.latents[:, -1]
            log_z = core.network("log_z", torch.zeros_like(last), core.kernel.steps, rows.conditioning)
            log_z = log_z.flatten(1).sum(1)
            residual = log_z + log_ratio - core.beta * rows.rewards
            yield Loss(residual**2, {"log_z": log_z.detach(), "log_ratio": log_ratio.detach()})


class SoftmaxRTBConfig(Config):
    """Options of trajectory balance within a group."""

    prior: bool = Field(True, description="false: p_θ alone, so that the target is exp(βr) over the group (TMPO)")


class SoftmaxRTB(Method):
    """`(log softmax_i Σ_k log p_θ/p_# − log softmax_i β r_i)²` over a prompt's samples i: no `log Z` is learned.

    - `rtb_softmax`: the target is `p_# exp(βr)`, as of `rtb`.
    - `tmpo`: leaves out `p_#`.

    The gradient reaches a trajectory with a weight that its group determines, so a group that a micro-batch does not
    hold is looked at first. The logged loss is the equation's.
    """

    Config = SoftmaxRTBConfig
    needs = Needs(rewards=True, density=True, whole_update=True)
    recipe = {"optimizer.lr": 1e-4}
    config: SoftmaxRTBConfig

    def tilted(self) -> bool:
        """Against the prior."""
        return self.config.prior

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over whole trajectories, or over whole groups where a micro-batch holds them.

        Where it does not, a pass over all comes first, for the weights of their gradients.
        """
        size = max(1, core.micro_batch // core.kernel.steps)
        parts: list[list[int]] = [[]]
        for prompt in dict.fromkeys(data.prompts):
            group = [i for i, own in enumerate(data.prompts) if own == prompt]
            parts = [*parts[:-1], parts[-1] + group] if len(parts[-1] + group) <= size else [*parts, group]
        if max(map(len, parts)) <= size:
            for rows in (data[torch.tensor(part)] for part in parts):
                policy, residual, _ = self.balance(self.ratios(core, rows), core.beta * rows.rewards, rows.prompts)
                yield Loss(residual**2, {"log_softmax": policy.detach()})
            return
        with torch.no_grad():
            ratios = torch.cat([self.ratios(core, rows) for rows in data.split(size)])
        policy, residual, weight = self.balance(ratios, core.beta * data.rewards, data.prompts)
        start = 0
        for rows in data.split(size):
            own = slice(start, start := start + len(rows))
            moving = log_density(core, rows)
            values = residual[own] ** 2 + weight[own] * (moving - moving.detach())
            yield Loss(values, {"log_softmax": policy[own]})

    def ratios(self, core: Core, data: Trajectory) -> Tensor:
        """`Σ_k log p_θ/p_#` of whole trajectories [B], or `Σ_k log p_θ`."""
        policy = log_density(core, data)
        return policy - log_density(core, data, prior=True) if self.config.prior else policy

    def balance(self, ratios: Tensor, tilts: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """`log softmax` of the log-ratios [B], minus that of `βr` [B], and the squares' gradient in the log-ratios."""
        policy, same = log_softmax_by_prompt(prompts, ratios)
        residual = policy - log_softmax_by_prompt(prompts, tilts)[0]
        return policy, residual, 2 * (residual - policy.exp() * (same @ residual))


def log_density(core: Core, data: Trajectory, prior: bool = False) -> Tensor:
    """`Σ_k log p(z_{k+1}|z_k)` of whole trajectories [B], under the policy or the prior; float64, being a long sum."""
    count = core.kernel.steps
    steps = torch.arange(count).expand(len(data), count)
    (part,) = data.transitions(steps, steps.numel())
    mean = core.kernel.mean(part.z, core.predict(part.z, part.k, part.conditioning, prior=prior), part.k)
    std = core.kernel.std(part.k, part.z)
    log_prob = gaussian_log_prob(part.z_next.double(), mean.double(), std.double())
    return log_prob.view(count, len(data)).sum(0)
