"""DRaFT: the reward's gradient through the last steps of the sampler, and its low-variance form."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from bench import NFE, Batch, Config, Core, Loss, Method, Needs


class SamplerBackpropagation(Method):
    """Backpropagate the reward through the sampler, from one step of each sample on.

        L(θ) = −E[ r(z_K) ],   z_{k+1} = μ_θ(z_k) + σ_k ε_k

    The steps before that one pass no gradient. β is not used: these methods maximise the reward.
    """

    needs = Needs(trajectory=False, reward_gradient=True)
    recipe = {"optimizer.lr": 4e-4, "optimizer.weight_decay": 1e-4}

    @abstractmethod
    def steps(self, core: Core, data: Batch) -> Tensor:
        """Long [B], on the CPU: the first step with a gradient, of each sample."""

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples whose gradient starts at the same step."""
        first = self.steps(core, data)
        for k in first.unique().tolist():
            for part in data[first == k].split(core.micro_batch):
                z = core.rollout(part, grad_from=k).latents[:, -1]
                reward = core.reward(z, part.prompts)
                yield Loss(-reward, {"reward": reward.detach()})

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself, and goes back through the steps with a gradient."""
        steps = core.kernel.steps
        return NFE(rollout=0, forward=steps * len(batch), backward=int((steps - self.steps(core, batch)).sum()))


class DRaFTConfig(Config):
    """Options of DRaFT-K."""

    depth: int = Field(5, ge=1, description="K of DRaFT-K: how many last sampling steps pass a gradient")


class DRaFT(SamplerBackpropagation):
    """DRaFT-K: backpropagate the reward through the last 5 sampling steps.

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

    def steps(self, core: Core, data: Batch) -> Tensor:
        """All steps pass a gradient."""
        return torch.zeros(len(data), dtype=torch.long)


class DRaFTLVConfig(Config):
    """Options of DRaFT-LV."""

    renoise: int = Field(2, ge=1, description="n: re-noised copies of each sample, over which the gradient is averaged")


class DRaFTLV(Method):
    """DRaFT-LV: backpropagate the reward through the last step, averaged over re-noised copies of each sample.

        L(θ) = −E[ (1/n) Σ_i r(μ_θ(z̃_i)) ],   z̃_i ~ p_B(z_{K−1} | z_K)

    The samples z_K are drawn without gradient, and p_B is the noising kernel. β is not used.

    Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR 2024,
    https://arxiv.org/abs/2309.17400
    """

    Config = DRaFTLVConfig
    needs = SamplerBackpropagation.needs
    recipe = SamplerBackpropagation.recipe
    config: DRaFTLVConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples, each with its n copies."""
        for part in data.split(core.micro_batch):
            z = core.rollout(part).latents[:, -1]
            rewards = [self.copy_reward(core, part, z, copy) for copy in range(self.config.renoise)]
            reward = torch.stack(rewards).mean(0)
            yield Loss(-reward, {"reward": reward.detach()})

    def copy_reward(self, core: Core, part: Batch, z: Tensor, copy: int) -> Tensor:
        """`r(μ_θ(z̃))` [n] of one re-noised copy z̃ of the clean latents z; `copy` numbers its noise."""
        last = core.kernel.steps - 1
        mean, std = core.kernel.noising(z, last)
        noised = mean + std * core.noise(part, copy, like=z)
        denoised = core.kernel.mean(noised, core.predict(noised, last, part.conditioning), last)
        return core.reward(denoised, part.prompts)

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself; each copy is predicted once, and learns."""
        copies = self.config.renoise
        return NFE(rollout=0, forward=(core.kernel.steps + copies) * len(batch), backward=copies * len(batch))
