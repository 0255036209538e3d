"""DMDR: its gradient is that of the divergence between known laws, and of the reward."""

from dataclasses import replace

import pytest
import torch
from bench.methods.dmdr import DMDR, DMDRConfig
from torch import Tensor, nn

from bench.core import Core
from bench.diagnose.selftest.scaffold import Linear
from bench.models.analytic import GaussianFlowModel, GaussianModel
from bench.options import Config
from bench.sampling.grids import ddim_kernel, flow_kernel

MEAN, STD = torch.tensor([0.7, -0.2], dtype=torch.float64), 0.6  # of the teacher
SHIFT, SCALE = torch.tensor([0.5, -0.3], dtype=torch.float64), 0.8  # of the student's samples


class KnownGap(nn.Module):
    """What the output of N(m, v I) has beside the teacher's, in the place of the network that learns it."""

    def __init__(self, model, kernel, mean: Tensor, std: float):
        super().__init__()
        self.model, self.kernel, self.mean, self.std = model, kernel, mean, std

    def forward(self, z: Tensor, t: Tensor, conditioning) -> Tensor:
        k = (self.kernel.times[None] - t[:, None]).abs().argmin(1)
        return output(self.kernel, z, k, self.mean, self.std) - self.model.predict(z, t, conditioning, prior=True)


def output(kernel, z: Tensor, k: Tensor, mean: Tensor, std: float) -> Tensor:
    """The mean of ε or of `ε − x` given z, for x ~ N(mean, std²)."""
    alpha, s = kernel.alpha_cumprod(k, z) ** 0.5, kernel.noise_level(k, z)
    noise = s * (z - alpha * mean) / (alpha**2 * std**2 + s**2)
    return noise if kernel.output == "epsilon" else noise - (z - s * noise) / alpha


def divergence(kernel, mean: Tensor, std: Tensor) -> Tensor:
    """`E_k KL(q_k ‖ p_k)` of N(mean, std²) to the teacher's law, over the levels of the kernel's steps."""
    alpha, s = kernel.alphas_cumprod[:-1] ** 0.5, torch.tensor([float(kernel.noise_level(k, torch.ones(1, 1)))
                                                                for k in range(kernel.steps)])  # fmt: skip
    ours, theirs = (alpha * std) ** 2 + s**2, (alpha * STD) ** 2 + s**2
    square = (alpha[:, None] * (mean - MEAN)).square().sum(1)
    return (0.5 * (2 * (ours / theirs - 1 - (ours / theirs).log()) + square / theirs)).mean()


def teacher_core(path: str) -> Core:
    if path == "flow":
        model = GaussianFlowModel(2, MEAN, STD, dtype=torch.float64)
        kernel = flow_kernel(8, spacing="shifted", final_noise=0.1, dtype=torch.float64)
        kernel = replace(kernel, timesteps=kernel.timesteps[2:], alphas_cumprod=kernel.alphas_cumprod[2:],
                         sigmas=kernel.sigmas[2:])  # fmt: skip  # without the level that has no signal
    else:
        model = GaussianModel(2, MEAN, STD, dtype=torch.float64)
        kernel = ddim_kernel(model.spec.alphas_cumprod, 6, spacing="trailing")
    sizes = {"micro_batch": 4096, "sample_batch": 4096}
    return Core(model, kernel, Linear(Config()), 2.0, teacher_model=(model, kernel), **sizes)


@pytest.mark.parametrize("path", ["flow", "diffusion"])
def test_with_the_students_own_score_the_slope_is_the_gradient_of_the_divergence(path):
    core, method = teacher_core(path), DMDR(DMDRConfig(fraction=1.0))
    core.networks["fake"] = KnownGap(core.model, core.kernel, MEAN + SHIFT, SCALE)
    mean, std = (MEAN + SHIFT).clone().requires_grad_(), torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    batch = core.batch(("", i) for i in range(20_000))
    noise = torch.randn(len(batch), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = mean + std * noise
    drawn = core.rollout(batch, stop_at=1)
    slope, _ = method.compare(core.teacher(), replace(drawn, latents=torch.stack([x.detach()] * 2, 1)))
    ours = torch.autograd.grad((slope * x).sum(1).mean(), (mean, std))
    exact = torch.autograd.grad(divergence(core.kernel, mean, std), (mean, std))
    assert torch.allclose(ours[0], exact[0], rtol=0.03, atol=0.01)
    assert torch.allclose(ours[1], exact[1], rtol=0.03, atol=0.01)
    assert exact[0].norm() > 0.1 and abs(exact[1]) > 0.1


@pytest.mark.parametrize("path", ["flow", "diffusion"])
def test_samples_of_the_teachers_law_leave_the_student_and_the_fake_score_alone(path):
    core, method = teacher_core(path), DMDR(DMDRConfig(fraction=1.0))
    core.networks.update(method.networks(core.model))
    batch = core.batch(("", i) for i in range(4096))
    drawn = core.rollout(batch, stop_at=1)
    noise = torch.randn(len(batch), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = MEAN + STD * noise
    slope, error = method.compare(core.teacher(), replace(drawn, latents=torch.stack([x] * 2, 1)))
    assert not slope.any()
    near = torch.autograd.grad(error.mean(), core.networks["fake"].bias)[0].norm()
    _, error = method.compare(core.teacher(), replace(drawn, latents=torch.stack([x + SHIFT] * 2, 1)))
    assert torch.autograd.grad(error.mean(), core.networks["fake"].bias)[0].norm() > 10 * near


def test_the_reward_enters_with_the_weight_beta():
    """The two defects of the published port: it has no reward, and its scores are of one network."""
    core, method = teacher_core("flow"), DMDR(DMDRConfig())
    core.networks.update(method.networks(core.model))
    batch = core.batch(("", i) for i in range(64))

    def gradient(beta: float) -> Tensor:
        (loss,) = method.losses(replace(core, beta=beta), batch)
        return torch.autograd.grad(loss.values.mean(), core.model.finetuned.bias)[0]

    assert not gradient(0.0).any()
    assert torch.allclose(gradient(3.0), 3 * gradient(1.0))
    assert gradient(1.0).any()
