"""What the ∇-GFlowNet methods share: options, the choice of transitions, and the reward's gradient."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import TILT, Batch, Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory, Transitions, mean_square


class NablaConfig(Config):
    """Options of every ∇-GFlowNet method, with the symbols of `NablaGFN`."""

    fraction: float = Field(0.1, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")
    gamma: Literal["alpha", "sqrt_alpha", "one"] = Field("alpha", description="γ_k: ᾱ_k, its square root, or 1")
    weighting: Literal["score", "kl"] = Field("kl", description="w_k of the transition losses: σ_k² ('kl') or 1")
    trust: float = Field(0.0, ge=0, description="λ of the trust region; 0: none")


class FlowConfig(NablaConfig):
    """Options of the methods that train a flow network."""

    reverse_weight: float = Field(1.0, ge=0, description="factor of the reverse loss")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the flow network g_φ")


class NablaMethod(Method):
    """Matches the scores of the policy's transitions to the reward's gradient plus a flow network `g_φ`."""

    needs = Needs(reward_gradient=True, density=True, memoryless=True, record=frozenset({"model_output"}))
    strength = TILT
    recipe = {
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.networks.flow.weight_decay": 1e-2,
    }
    config: Any

    def tilted(self) -> bool:
        """True: the loss of a residual method is zero for `p_# exp(βr)`."""
        return True

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """The flow network `g_φ`, zero at the start."""
        return {"flow": model.latent_network(self.config.channels)}

    def steps(self, core: Core, batch: Batch) -> Tensor:
        """Long [B, S]: the steps k of each trajectory whose transitions are trained on, the last always among them."""
        return core.choose_steps(batch, self.config.fraction)

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the chosen transitions of every trajectory."""
        steps = self.steps(core, data)
        for part in data.transitions(steps, core.micro_batch):
            yield self.micro_loss(part, steps, *self.transition_losses(core, part))

    def micro_loss(self, part: Transitions, steps: Tensor, losses: dict[str, Tensor], rewards: Tensor) -> Loss:
        """The sum of the losses. Logs each of them, and the rewards of finished samples."""
        metrics = {name: values.detach() for name, values in losses.items()} | {"reward": rewards[part.finished]}
        total: Any = sum(losses.values())
        return Loss(total / steps.shape[1], metrics)

    @abstractmethod
    def transition_losses(self, core: Core, part: Transitions) -> tuple[dict[str, Tensor], Tensor]:
        """Losses [n] by name, and the rewards [n] of the clean predictions at `z_{k+1}`."""

    def reward_score(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """`β γ_{k+1} ∇_z r(decode(ẑ_θ(z)))` at `z = z_{k+1}` [n, *latent], with `ẑ_θ(z_K) = z_K`.

        Also returns the rewards [n], and `μ_θ(z_{k+1})` [m, *latent] of the m transitions with k + 1 < K. Everything is
        detached; the graphs are freed on return.
        """
        inner, k = part.unfinished, part.k + 1
        clean, mean = part.z_next, part.z_next[inner]
        if len(inner):
            z = part.z_next[inner].requires_grad_()
            with core.model.merged():
                output = core.predict(z, k[inner], part.conditioning[inner])
            prediction = core.kernel.clean(z, output, k[inner])
            mean = core.kernel.mean(z, output, k[inner]).detach()
            clean = clean.index_copy(0, inner, prediction.detach())
        rewards, gradient = core.reward_gradient(clean, part.prompts)
        if len(inner):
            gradient = gradient.index_copy(0, inner, torch.autograd.grad(prediction, z, gradient[inner])[0])
        return core.beta * self.gamma(core, k, gradient) * gradient, rewards, mean

    def gamma(self, core: Core, k: Tensor, like: Tensor) -> Tensor:
        """`γ_k`, shaped to broadcast over `like`; 1 at k = K."""
        alpha = core.kernel.alpha_cumprod(k, like)
        powers = {"alpha": alpha, "sqrt_alpha": alpha**0.5, "one": torch.ones_like(alpha)}
        return powers[self.config.gamma].where((k < core.kernel.steps).view_as(alpha), 1)

    def weight(self, core: Core, k: Tensor, z: Tensor) -> Tensor:
        """`w_k` [n]."""
        variance = core.kernel.std(k, z).flatten() ** 2
        return variance if self.config.weighting == "kl" else torch.ones_like(variance)

    def flows(self, core: Core, part: Transitions) -> tuple[Tensor, Tensor]:
        """`g_φ(z_k)` and `g_φ(z_{k+1})`, each [n, *latent]."""
        states = torch.cat([part.z, part.z_next]), torch.cat([part.k, part.k + 1])
        flow, next_flow = core.network("flow", *states, part.conditioning.join([part.conditioning] * 2)).chunk(2)
        return flow, next_flow

    def terminal_loss(self, part: Transitions, next_flow: Tensor) -> Tensor:
        """`‖g_φ(z_K)‖²` [n] on the last transitions, zero elsewhere."""
        return scatter(mean_square(next_flow[part.finished]), part.finished, len(part))

    def trust_loss(self, part: Transitions, output: Tensor) -> dict[str, Tensor]:
        """`λ ‖o_θ − o_old‖²` [n] under its name, with `o_old` from the policy that sampled; empty if λ = 0."""
        trust = self.config.trust
        return {"trust": trust * mean_square(output - part.model_output)} if trust else {}

    def states(self, core: Core, batch: Batch) -> tuple[int, int, int]:
        """How many states are `z_k` of a chosen transition, how many `z_{k+1}` with k + 1 < K, and how many either."""
        chosen = [set(steps) for steps in self.steps(core, batch).tolist()]
        following = [{k + 1 for k in steps} - {core.kernel.steps} for steps in chosen]
        either = [a | b for a, b in zip(chosen, following, strict=True)]
        return sum(map(len, chosen)), sum(map(len, following)), sum(map(len, either))


def scatter(values: Tensor, index: Tensor, n: int) -> Tensor:
    """[n], zero except for the values [m] at the index [m]."""
    return values.new_zeros(n).index_copy(0, index, values)
