"""VGG-Flow: match the velocity to the prior's plus the gradient of a value, and its form without a value network."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import (
    NFE,
    TILT,
    Batch,
    Config,
    Core,
    DiffusionModel,
    Loss,
    Method,
    Needs,
    Trajectory,
    Transitions,
    mean_square,
)

TINY = 1e-12


class VGGFlowPrunedConfig(Config):
    """Options of VGG-Flow without a value network; symbols as in the docstring of `VGGFlow`."""

    fraction: float = Field(
        0.25, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none"
    )
    schedule: Literal["quad", "linear", "constant"] = Field("linear", description="η: (1−s)², 1−s, or 1")
    largest: float | None = Field(1.0, gt=0, description="largest norm of a reward gradient; null: any")


class VGGFlowConfig(VGGFlowPrunedConfig):
    """Options of VGG-Flow; symbols as in the docstring of `VGGFlow`."""

    schedule: Literal["quad", "linear", "constant"] = Field("quad", description="η: (1−s)², 1−s, or 1")
    consistency: float = Field(1.0, ge=0, description="weight of the consistency of G along the trajectory")
    terminal: float = Field(1000.0, ge=0, description="weight of ν_φ(z_K)²")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of ν_φ")


class VGGFlow(Method):
    """VGG-Flow: match the velocity to the prior's plus the gradient of a learned value.

    G is the negative gradient of the value. It is made of the reward's gradient at the clean prediction and a
    learned correction ν_φ:

        β G(z_k) = ν_φ(z_k) − β η_k g(z_k),   g(z_k) = ∇ r(decode(x̂_k)) cut to norm 1

    without the Jacobian of the prediction x̂_k. The loss of a transition has three terms, means over elements:

        velocity     ‖ v_θ(z_k) − sg( v_#(z_k) + β G(z_k) ) ‖²
        consistency  ‖ [ G(z_k) − sg( (∂μ_#/∂z_k)ᵀ G(z_{k+1}) ) ] / (s_k − s_{k+1}) ‖²
        terminal     ‖ ν_φ(z_K) ‖²

    G of a deterministic trajectory obeys the equation of the second term. (The paper writes the same equation with
    finite differences in the network's time; in its code the gradient at the second time is another function.) For a
    model whose output is not a velocity, a change of v is the change of the output that moves x̂ as much. The paper
    samples without noise; any sampler is possible.

    VGG-Flow, "value gradient guidance for flow matching", https://arxiv.org/abs/2512.05116
    """

    Config = VGGFlowConfig
    needs = Needs(reward_gradient=True, denoiser=True)
    recipe = {"optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4}
    strength = TILT
    config: VGGFlowConfig

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """`ν_φ`, zero at the start."""
        return {"value": model.latent_network(self.config.channels)}

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, S], on the CPU: a random subset of every trajectory's steps, the last always among them."""
        return core.choose_steps(data, self.config.fraction)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions of every trajectory."""
        steps = self.steps(core, data)
        for part in data.transitions(steps, core.micro_batch):
            values, metrics = self.transition_losses(core, part)
            yield Loss(values / steps.shape[1], metrics)

    def transition_losses(self, core: Core, part: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each transition [n], and its parts and the rewards of finished samples for the log."""
        config, kernel = self.config, core.kernel
        output = core.predict(part.z, part.k, part.conditioning)
        rewards, reward_score = core.reward_gradient(kernel.clean(part.z, output, part.k), part.prompts)
        value = core.network("value", part.z, part.k, part.conditioning)
        value_next = core.network("value", part.z_next, part.k + 1, part.conditioning)
        beta_g = value + reward_term(core, config, part.k, reward_score)
        z = part.z.detach().requires_grad_(config.consistency > 0)
        prior_output = core.predict(z, part.k, part.conditioning, prior=True)
        finished = torch.zeros_like(rewards).index_fill(0, part.finished, 1)
        losses = {
            "velocity": velocity_loss(core, part, output, prior_output.detach(), beta_g.detach()),
            "terminal": config.terminal * finished * mean_square(value_next),
        }
        if config.consistency:
            beta_g_next = self.beta_g_next(core, part, value_next.detach())
            (beta_g_back,) = torch.autograd.grad(kernel.mean(z, prior_output, part.k), z, beta_g_next)
            beta = max(core.beta, TINY)  # 0 in the first update of a warm-up, where the difference is 0 too
            change = (beta_g - beta_g_back) / (beta * kernel.noise_decrease(part.k, part.z))
            losses["consistency"] = config.consistency * mean_square(change)
        metrics = {name: loss.detach() for name, loss in losses.items()} | {"reward": rewards[part.finished]}
        total: Any = sum(losses.values())
        return total, metrics

    def beta_g_next(self, core: Core, part: Transitions, value_next: Tensor) -> Tensor:
        """`β G(z_{k+1})` [n, *latent], detached, for `value_next = ν_φ(z_{k+1})`, which counts as zero at z_K."""
        inner, clean = part.unfinished, part.z_next
        if len(inner):
            z, k = part.z_next[inner], part.k[inner] + 1
            with torch.no_grad():
                output = core.predict(z, k, part.conditioning[inner])
            clean = clean.index_copy(0, inner, core.kernel.clean(z, output, k))
        _, reward_score = core.reward_gradient(clean, part.prompts)
        return reward_term(core, self.config, part.k + 1, reward_score) + value_next.index_fill(0, part.finished, 0)

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """Policy and prior at z_k; for the consistency, the policy at z_{k+1} and the Jacobian of the prior."""
        steps = self.steps(core, batch).tolist()
        states = sum(map(len, steps))
        ends = sum(len({k + 1 for k in chosen} - {core.kernel.steps, *chosen}) for chosen in steps)
        forward, backward = (2 * states + ends, 2 * states) if self.config.consistency else (2 * states, states)
        return NFE(rollout=core.kernel.steps * len(steps), forward=forward, backward=backward)


class VGGFlowPruned(Method):
    """VGG-Flow without a value network: the reward's gradient at the finished sample.

    The loss of a transition is, mean over elements,

        ‖ v_θ(z_k) − sg( v_#(z_k) − β η_k g ) ‖²,   g = ∇ r(decode(z_K)) cut to norm 1

    arXiv 2604.17415, https://arxiv.org/abs/2604.17415
    """

    Config = VGGFlowPrunedConfig
    needs = Needs(reward_gradient=True)
    recipe = VGGFlow.recipe
    strength = TILT
    config: VGGFlowPrunedConfig

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, S], on the CPU: a random subset of every trajectory's steps, the last always among them."""
        return core.choose_steps(data, self.config.fraction)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions of every trajectory."""
        steps = self.steps(core, data)
        scored = [core.reward_gradient(rows.latents[:, -1], rows.prompts) for rows in data.split(core.micro_batch)]
        rewards, reward_score = (torch.cat(parts) for parts in zip(*scored, strict=True))
        for part in data.transitions(steps, core.micro_batch):
            velocity = self.transition_losses(core, part, reward_score[part.row])
            metrics = {"velocity": velocity.detach(), "reward": rewards[part.row[part.finished]]}
            yield Loss(velocity / steps.shape[1], metrics)

    def transition_losses(self, core: Core, part: Transitions, reward_score: Tensor) -> Tensor:
        """The loss of each transition [n]; reward_score: `∇r` [n, *latent] at its trajectory's finished sample."""
        output = core.predict(part.z, part.k, part.conditioning)
        prior_output = core.predict(part.z, part.k, part.conditioning, prior=True)
        return velocity_loss(core, part, output, prior_output, reward_term(core, self.config, part.k, reward_score))

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """Policy and prior at every chosen state."""
        states = self.steps(core, batch).numel()
        return NFE(rollout=core.kernel.steps * len(batch), forward=2 * states, backward=states)


def reward_term(core: Core, config: VGGFlowPrunedConfig, k: Tensor, reward_score: Tensor) -> Tensor:
    """`−β η_k g` [n, *latent] of reward gradients at step k."""
    if config.largest is not None:
        norm = reward_score.flatten(1).norm(dim=1).clamp(min=1e-30)
        reward_score = reward_score * (config.largest / norm).clamp(max=1).view(-1, *(1,) * (reward_score.ndim - 1))
    power = {"quad": 2, "linear": 1, "constant": 0}[config.schedule]
    return -core.beta * (1 - core.kernel.noise_level(k, reward_score)) ** power * reward_score


def velocity_loss(core: Core, part: Transitions, output: Tensor, prior_output: Tensor, beta_g: Tensor) -> Tensor:
    """`‖ v_θ − (v_# + β G) ‖²` [n], mean over elements, in units of the model's output.

    A change 1 of a flow's velocity moves x̂ by −s. `unit` is the change of the output that does the same; 1 for a flow.
    """
    slope = core.kernel.clean(torch.zeros_like(part.z), torch.ones_like(part.z), part.k)  # ∂x̂/∂o
    unit = -core.kernel.noise_level(part.k, part.z) / slope
    return mean_square(output - (prior_output + unit * beta_g))
