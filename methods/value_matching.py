"""Value matching: a value network learns the cost that is still to come, and its gradient steers the frozen prior."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import NFE, TILT, Batch, Conditioning, Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory


class ValueMatchingConfig(Config):
    """Options of value matching; symbols as in its docstring."""

    target: Literal["log_ratio", "kl"] = Field(
        "log_ratio",
        description="what a step adds to the cost: its log-ratio at the sampled state, or (published) its KL",
    )
    fraction: float = Field(1.0, ge=0, le=1, description="states besides the last (one at least), over K; 0: none")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the value network")


class ValueMatching(Method):
    """Value matching: regression of a value network, whose gradient steers the frozen prior; black-box rewards.

    The policy's step has the mean `μ_φ(z_k) = μ_# − σ_k² ∇V_φ(μ_#, k+1)` with `μ_# = μ_#(z_k)`, and V_φ, the sum over
    the elements of a network's output, regresses on what the rest of a trajectory costs:

        ω_k (V_φ(z_k) − c_k)²,   c_k = Σ_{j≥k} log p_φ(z_{j+1} | z_j) / p_#(z_{j+1} | z_j) − β r(z_K)

    for k = 1 … K, where `ω_k = 1 / (1 + ½ Σ_{j≥k} σ_j²)` and c_k has no gradient. The fixed point is
    `V = −log E_#[exp(βr) | z_k]`, where c_k does not vary. The prior's weights and the adapters stay as they are; every
    evaluation samples with the network.

    The published code has `‖μ_φ(z_j) − μ_#(z_j)‖² / 2σ_j²` in the place of the log-ratio (`target: kl`), which is equal
    on average; and it takes the gradient at z_k and step k in the place of μ_# and step k+1, which is exact in the
    limit of many steps only. Published sampler: memoryless (rule `ddim`, η = 1).

    https://github.com/cristianpjensen/diffusiongym
    """

    Config = ValueMatchingConfig
    needs = Needs(
        rewards=True,
        density=True,
        memoryless=True,
        record=frozenset({"model_output", "prior_output"}),
        adapters=False,
    )
    strength = TILT
    recipe = {"optimizer.lr": 1e-4, "optimizer.weight_decay": 0.0}
    config: ValueMatchingConfig

    def tilted(self) -> bool:
        """Always."""
        return True

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """The network of V_φ, zero at the start."""
        return {"value": model.latent_network(self.config.channels)}

    def value(self, core: Core, z: Tensor, k: int | Tensor, conditioning: Conditioning) -> Tensor:
        """V_φ [n] at step k."""
        return core.network("value", z, k, conditioning).flatten(1).sum(1)

    def steer(self, core: Core, z: Tensor, k: int, conditioning: Conditioning, output: Tensor) -> Tensor:
        """The output [n, *latent] whose step from z_k has the mean μ_φ; output: the prior's."""
        kernel = core.kernel
        with torch.enable_grad():
            mean = kernel.mean(z, output, k).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(core, mean, k + 1, conditioning).sum(), mean)
        gain = kernel.mean(torch.zeros_like(z), torch.ones_like(z), k)  # ∂μ/∂o
        return output - kernel.std(k, z) ** 2 / gain * gradient

    def collect(self, core: Core, batch: Batch, number: int) -> Trajectory:
        """Trajectories of the steered prior."""
        return self.sample(core, batch, record=self.needs.record)

    def sample(self, core: Core, batch: Batch, **options: Any) -> Trajectory:
        """Trajectories of the steered prior."""
        return core.rollout(batch, steer=partial(self.steer, core), **options)

    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B, S], on the CPU: the steps whose ends are regressed; the last is always among them."""
        return core.choose_steps(data, self.config.fraction)

    def costs(self, core: Core, data: Trajectory) -> Tensor:
        """c_k [B, K+1]."""
        steps, rewards, outputs, prior_outputs = [], data.rewards, data.model_output, data.prior_output
        for k in range(data.steps):
            z, z_next, std = data.latents[:, k], data.latents[:, k + 1], core.kernel.std(k, data.latents[:, k])
            mean, prior_mean = (core.kernel.mean(z, output[:, k], k) for output in (outputs, prior_outputs))
            drift = (mean - prior_mean) / std
            cost = drift**2 / 2
            if self.config.target == "log_ratio":
                cost = cost + drift * (z_next - mean) / std
            steps.append(cost.flatten(1).sum(1))
        costs = torch.stack([*steps, -core.beta * rewards], 1)
        return costs.flip(1).cumsum(1).flip(1)

    def weights(self, core: Core, data: Trajectory) -> Tensor:
        """ω_k [K+1]."""
        variances = torch.stack([core.kernel.std(k, data.rewards) ** 2 for k in range(data.steps)])
        weights = 1 / (1 + variances.flip(0).cumsum(0).flip(0) / 2)
        return torch.cat([weights, torch.ones_like(weights[:1])])

    def losses(self, core: Core, data: Trajectory) -> Iterator[Loss]:
        """Micro-losses over the ends of the chosen steps of every trajectory."""
        steps, costs = self.steps(core, data), self.costs(core, data)
        weights = self.weights(core, data).to(costs)
        for part in data.transitions(steps, core.micro_batch):
            k = part.k + 1
            error = self.value(core, part.z_next, k, part.conditioning) - costs[part.row, k]
            yield Loss(weights[k] * error**2 / steps.shape[1], {"value_error": error.detach().abs()})

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The prior at every state of the rollout; the losses need the value network alone."""
        return NFE(rollout=core.kernel.steps * len(batch), forward=0, backward=0)
