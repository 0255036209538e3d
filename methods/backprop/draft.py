"""DRaFT: the reward's gradient through the last steps of the sampler, and its low-variance form."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from bench import NFE, Batch, Core, Loss

from .base import BackpropagationConfig, RewardBackpropagation


class SamplerBackpropagation(RewardBackpropagation):
    """Backpropagate the reward through the sampler, from one step of each sample on.

        L(θ) = −E[ r(z_K) ],   z_{k+1} = μ_θ(z_k) + σ_k ε_k

    The steps before that one pass no gradient, and have no KL.
    """

    recipe = {"optimizer.lr": 4e-4, "optimizer.weight_decay": 1e-4}

    @abstractmethod
    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B], on the CPU: the first step with a gradient, of each sample."""

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples whose gradient starts at the same step."""
        chosen, record = self.steps(core, data), frozenset({"model_output"} if self.config.kl else ())
        for first in chosen.unique().tolist():
            for part in data[chosen == first].split(core.micro_batch):
                path = core.rollout(part, grad_from=first, record=record)
                reward = core.reward(path.latents[:, -1], part.prompts)
                visited = ((path.latents[:, k], path.model_output[:, k], k) for k in range(first, core.kernel.steps))
                yield Loss(self.with_kl(core, part, -reward, visited), {"reward": reward.detach()})

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself, and goes back through the steps with a gradient; the first state is fixed."""
        count, states = len(batch), int((core.kernel.steps - self.steps(core, batch)).sum())
        prior, prior_back = self.prior_nfe(states, states - count)
        return NFE(rollout=0, forward=core.kernel.steps * count + prior, backward=states + prior_back)


class DRaFTConfig(BackpropagationConfig):
    """Options of DRaFT-K."""

    depth: int = Field(5, ge=1, description="K of DRaFT-K: how many last sampling steps pass a gradient")


class DRaFT(SamplerBackpropagation):
    """DRaFT-K: backpropagate the reward through the last K sampling steps, 5 by default.

    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024,
    https://arxiv.org/abs/2309.17400
    """

    Config = DRaFTConfig
    config: DRaFTConfig

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The last `depth` steps pass a gradient."""
        return torch.full((len(data),), max(core.kernel.steps - self.config.depth, 0))


class DRaFT1(SamplerBackpropagation):
    """DRaFT-1: backpropagate the reward through the last sampling step alone.

    From the same paper as `DRaFT`.
    """

    def steps(self, core: Core, data: Batch) -> Tensor:
        """The last step."""
        return torch.full((len(data),), core.kernel.steps - 1)


class DRaFTFull(SamplerBackpropagation):
    """DRaFT: backpropagate the reward through all sampling steps.

    From the same paper as `DRaFT`.
    """

    def tilted(self) -> bool:
        """With the KL of the path at weight 1."""
        return self.config.kl == 1 and self.config.penalty == "path"

    def steps(self, core: Core, data: Batch) -> Tensor:
        """All steps pass a gradient."""
        return torch.zeros(len(data), dtype=torch.long)


class DRaFTKLConfig(BackpropagationConfig):
    """Options of DRaFT with the KL."""

    kl: float = Field(1.0, ge=0, description="w: weight of the KL to the prior, beside β times the reward; 0: none")


class DRaFTKL(DRaFTFull):
    """DRaFT through all sampling steps, less the KL of the whole path to the prior's; it samples from p_# exp(βr).

        L(θ) = E[ −β r(z_K) + Σ_k |μ_θ(z_k) − μ_#(z_k)|² / 2σ_k² ]

    This is the objective of stochastic optimal control itself; `AdjointMatching` regresses on its solution. Steps and
    noise are those of `DRaFTFull`, the KL is that of `RewardBackpropagation`.
    """

    Config = DRaFTKLConfig


class DRaFTLVConfig(BackpropagationConfig):
    """Options of DRaFT-LV."""

    renoise: int = Field(2, ge=1, description="n: re-noised copies of each sample, over which the gradient is averaged")


class DRaFTLV(RewardBackpropagation):
    """DRaFT-LV: backpropagate the reward through the last step, averaged over re-noised copies of each sample.

        L(θ) = −E[ (1/n) Σ_i r(μ_θ(z̃_i)) ],   z̃_i ~ p_B(z_{K−1} | z_K)

    The samples z_K are drawn without gradient, and p_B is the noising kernel. A KL is the mean of that at each z̃_i.

    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024,
    https://arxiv.org/abs/2309.17400
    """

    Config = DRaFTLVConfig
    recipe = SamplerBackpropagation.recipe
    config: DRaFTLVConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples, each with its n copies."""
        for part in data.split(core.micro_batch):
            z = core.rollout(part).latents[:, -1]
            copies = [self.copy_loss(core, part, z, copy) for copy in range(self.config.renoise)]
            loss, reward = (torch.stack(values).mean(0) for values in zip(*copies, strict=True))
            yield Loss(loss, {"reward": reward})

    def copy_loss(self, core: Core, part: Batch, z: Tensor, copy: int) -> tuple[Tensor, Tensor]:
        """Loss and reward `r(μ_θ(z̃))` [n] of one re-noised copy z̃ of the clean latents z; `copy` numbers its noise."""
        last = core.kernel.steps - 1
        mean, std = core.kernel.noising(z, last)
        noised = mean + std * core.noise(part, copy, like=z)
        output = core.predict(noised, last, part.conditioning)
        reward = core.reward(core.kernel.mean(noised, output, last), part.prompts)
        return self.with_kl(core, part, -reward, [(noised, output, last)]), reward.detach()

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself; each copy is predicted once, and learns."""
        copies = self.config.renoise * len(batch)
        prior, _ = self.prior_nfe(copies, 0)
        return NFE(rollout=0, forward=core.kernel.steps * len(batch) + copies + prior, backward=copies)
