"""DRaFT: backpropagation of the reward through sampling (Clark et al., "Directly Fine-Tuning Diffusion Models on
Differentiable Rewards", ICLR 2024)."""

from collections.abc import Iterator

from pydantic import Field

from bench import Batch, Config, Core, Loss, Method, Needs


class DRaFTConfig(Config):
    """Options of DRaFT-K."""

    depth: int = Field(5, ge=0, description="K of DRaFT-K: last sampling steps with gradient; 0 means all")


class DRaFT(Method):
    """Maximise `E_θ[r(decode(z_K))]` through the last `depth` steps of the sampler; loss `−r`. β is not used."""

    Config = DRaFTConfig
    needs = Needs(trajectory=False, reward_gradient=True)
    recipe = {"optimizer.lr": 4e-4, "optimizer.weight_decay": 1e-4}
    config: DRaFTConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per part of the batch."""
        depth = min(self.config.depth or core.kernel.steps, core.kernel.steps)
        for part in data.split(core.micro_batch):
            trajectory = core.rollout(part, grad_from=core.kernel.steps - depth)
            rewards = core.reward(trajectory.latents[:, -1], part.prompts)
            yield Loss(-rewards, {"reward": rewards.detach()})
