"""VGG-Flow: value gradient guidance for flow matching (arXiv 2512.05116), and its pruned form (arXiv 2604.17415)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory, Transitions


class VGGFlowConfig(Config):
    """Options of VGG-Flow; symbols as in the class docstring."""

    fraction: float = Field(
        0.25, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none"
    )
    schedule: Literal["quad", "linear", "constant"] = Field("quad", description="η: (1−s)², 1−s, or 1")
    largest: float | None = Field(1.0, gt=0, description="largest norm of a reward gradient; null: any")
    gradient_at: Literal["prediction", "sample"] = Field("prediction", description="where r is differentiated")
    value_network: bool = Field(True, description="train ν_φ; false: the control is the reward gradient alone")
    consistency: float = Field(1.0, ge=0, description="weight of the consistency of G along the trajectory")
    terminal: float = Field(1000.0, ge=0, description="weight of ν_φ(z_K)²")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of ν_φ")


class VGGFlow(Method):
    """Match the velocity to the prior's and minus the value's gradient: `‖v_θ − sg(v_# + β G)‖²`, `G = ν_φ/β − η g`.

    `g = ∇ r(decode(x̂))` at the clean prediction, cut to norm 1, the prediction's Jacobian left out. G, minus the
    gradient of the value, obeys `G(z_k) = (∂μ_#/∂z_k)ᵀ G(z_{k+1})` along a deterministic trajectory; ν_φ learns this,
    per unit of the noise level, and `ν_φ(z_K) = 0`. (Published is the same equation by finite differences of the
    network's time; there the gradient at the second time is another function.) A vector of velocities is what it is
    for a flow's output, and for other outputs what moves the clean prediction as much.

    `vgg_flow_pruned`: no ν_φ, and g at the finished sample. Sampling without noise is published; any is possible.
    """

    Config = VGGFlowConfig
    needs = Needs(reward_gradient=True)
    recipe = {"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4}
    config: VGGFlowConfig

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """`ν_φ`, zero at the start."""
        return {"value": model.latent_network(self.config.channels)} if self.config.value_network else {}

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over a random subset of every trajectory's transitions, the last always among them."""
        steps = core.choose_steps(data, self.config.fraction)
        at_sample = rewards = None
        if self.config.gradient_at == "sample":
            found = [core.reward_gradient(rows.latents[:, -1], rows.prompts) for rows in data.split(core.micro_batch)]
            rewards, at_sample = (torch.cat(parts) for parts in zip(*found, strict=True))
        for part in data.transitions(steps, core.micro_batch):
            known = None if at_sample is None else (rewards[part.row], at_sample[part.row])
            values, metrics = self.transition_losses(core, part, known)
            yield Loss(values / steps.shape[1], metrics)

    def transition_losses(
        self, core: Core, part: Transitions, known: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each transition [n], and its parts; known: rewards and their gradients at the finished samples."""
        config, kernel = self.config, core.kernel
        output = core.predict(part.z, part.k, part.conditioning)
        rewards, score = known or core.reward_gradient(kernel.clean(part.z, output, part.k), part.prompts)
        pull = self.pull(core, part.k, score)
        own = core.network("value", part.z, part.k, part.conditioning) if config.value_network else None
        z = part.z.detach().requires_grad_(config.value_network and config.consistency > 0)
        prior_output = core.predict(z, part.k, part.conditioning, prior=True)
        correction = pull if own is None else pull + own.detach()
        target = prior_output.detach() + self.unit(core, part) * correction
        losses = {"velocity": _mean_square(output - target)}
        if own is not None:
            last = core.network("value", part.z_next, part.k + 1, part.conditioning)
            ends = torch.zeros_like(losses["velocity"]).index_fill(0, part.finished, 1)
            losses["terminal"] = config.terminal * ends * _mean_square(last)
            if config.consistency:
                ahead = self.ahead(core, part, last.detach())
                (back,) = torch.autograd.grad(kernel.mean(z, prior_output, part.k), z, ahead)
                gap = (pull + own - back) / (core.beta * kernel.noise_decrease(part.k, part.z))
                losses["consistency"] = config.consistency * _mean_square(gap)
        metrics = {name: value.detach() for name, value in losses.items()} | {"reward": rewards[part.finished]}
        return sum(losses.values()), metrics

    def pull(self, core: Core, k: Tensor, score: Tensor) -> Tensor:
        """`−β η g` [n, *latent] of reward gradients at step k."""
        if self.config.largest is not None:
            norm = score.flatten(1).norm(dim=1).clamp(min=1e-30)
            score = score * (self.config.largest / norm).clamp(max=1).view(-1, *(1,) * (score.ndim - 1))
        power = {"quad": 2, "linear": 1, "constant": 0}[self.config.schedule]
        return -core.beta * (1 - core.kernel.noise_level(k, score)) ** power * score

    def ahead(self, core: Core, part: Transitions, value: Tensor) -> Tensor:
        """`β G(z_{k+1})` [n, *latent], detached; at the finished sample ν_φ is zero."""
        inner, clean = part.unfinished, part.z_next
        if len(inner):
            z, k = part.z_next[inner], part.k[inner] + 1
            predicted = core.predict(z, k, part.conditioning[inner]).detach()
            clean = clean.index_copy(0, inner, core.kernel.clean(z, predicted, k))
        _, score = core.reward_gradient(clean, part.prompts)
        return self.pull(core, part.k + 1, score) + value.index_fill(0, part.finished, 0)

    def unit(self, core: Core, part: Transitions) -> Tensor:
        """The change of the output that moves x̂ as a change 1 of a flow's velocity does, `−s`; 1 for a flow."""
        slope = core.kernel.clean(torch.zeros_like(part.z), torch.ones_like(part.z), part.k)
        return -core.kernel.noise_level(part.k, part.z) / slope


def _mean_square(x: Tensor) -> Tensor:
    return (x**2).flatten(1).mean(1)
