"""DMDR: "Distribution Matching Distillation Meets Reinforcement Learning", 2025."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from bench import NFE, TILT, Batch, Config, Core, DiffusionModel, Loss, Method, Needs, Trajectory, mean_square


class DMDRConfig(Config):
    """Options of DMDR."""

    fraction: float = Field(0.2, gt=0, le=1, description="noise levels at which a sample is compared, over all")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the network beside the teacher")


class DMDR(Method):
    """DMDR: reward of a few-step student's samples, less the KL of their noised law to that of its teacher.

        L(θ) = E_k[ KL(q_k ‖ p_k) ] − β E[ r(x) ],   x = G_θ(z_0, c),   z_k = α_k x + s_k ε

    k is a noise level of the teacher's sampler, q_k the law of z_k for samples x of the student, and p_k that for
    samples of the teacher. The gradient in a sample is

        ∂KL_k/∂x = (α_k² / s_k²) (x̂_fake(z_k) − x̂_real(z_k))

    It goes through all steps of the student, as the reward's does. The real prediction is the guided teacher's. The
    fake one is the teacher's output plus a network, zero at the start, that regresses at the same z_k on what noising
    would have (noise, v or velocity), by which it follows the student.

    The mean over levels is less than KL(q ‖ p), the more so the noisier they are, so the optimum is no p_# exp(βr)
    and no target is declared. The paper divides the gradient by `mean |x − x̂_real|` of each sample, which leaves the
    weight of the reward undefined; here it has its units. In the paper the fake network learns five times for each
    update of the student, and the reward comes in after a start without it; here both learn together from the start.

    Jiang et al., 2025: https://arxiv.org/abs/2511.13649
    """

    Config = DMDRConfig
    needs = Needs(trajectory=False, reward_gradient=True, teacher=True)
    recipe = {"optimizer.lr": 1e-4, "optimizer.networks.fake.lr": 1e-3}
    strength = TILT
    config: DMDRConfig

    def networks(self, model: DiffusionModel) -> dict[str, nn.Module]:
        """What the fake prediction has beside the real one."""
        return {"fake": model.latent_network(self.config.channels)}

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """One micro-loss per micro-batch of samples, of the student and of the network."""
        for part in data.split(core.micro_batch):
            path = core.rollout(part, grad_from=0)
            x = path.latents[:, -1]
            reward = core.reward(x, part.prompts)
            slope, error = self.compare(core.teacher(), replace(path, latents=path.latents.detach()))
            divergence = (slope * x).flatten(1).sum(1)  # its gradient is the KL's, its value nothing
            metrics = {"reward": reward.detach(), "fake": error.detach(), "slope": mean_square(slope)}
            yield Loss(divergence - core.beta * reward + error, metrics)

    def compare(self, teacher: Core, path: Trajectory) -> tuple[Tensor, Tensor]:
        """`∂KL/∂x` [B, *latent] of the finished samples, without gradient, and the error [B] of the fake output.

        Both are means over the chosen noise levels.
        """
        path, kernel = replace(path, conditioning=teacher.model.encode(path.prompts)), teacher.kernel
        slopes, errors = [], []
        for part in teacher.noised(path, self.steps(teacher, path), len(path)):  # a level of every sample
            with torch.no_grad():
                real = teacher.predict(part.z, part.k, part.conditioning, prior=True)
            fake = real + teacher.network("fake", part.z, part.k, part.conditioning)
            errors.append(mean_square(fake - part.target))
            gap = kernel.clean(part.z, fake.detach(), part.k) - kernel.clean(part.z, real, part.k)
            slopes.append(kernel.alpha_cumprod(part.k, gap) / kernel.noise_level(part.k, gap) ** 2 * gap)
        return torch.stack(slopes).mean(0), torch.stack(errors).mean(0)

    def steps(self, teacher: Core, data: Batch) -> Tensor:
        """The teacher's steps [B, S] whose noise levels the samples get."""
        return teacher.choose_steps(data, self.config.fraction, last="like any")

    def nfe(self, core: Core, batch: Batch) -> NFE:
        """The loss samples for itself, and goes back through all steps; the teacher predicts at every noised sample."""
        states = core.kernel.steps * len(batch)
        return NFE(0, forward=states + self.steps(core.teacher(), batch).numel(), backward=states)
