"""Time grids are those of the pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from example_families import VIDEO

from bench.config import resolve
from bench.models.cards import CARDS
from bench.models.catalogue import make_kernel
from bench.runs.estimate import blueprint
from bench.sampling.grids import flow_kernel
from bench.settings import SamplerConfig


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("name", ["sana-600m", VIDEO])
def test_the_grid_of_a_solver_of_higher_order_is_near_ours(name, steps):
    """Its first level lies beside 1, or its last beside 0, by 0.001 before the shift."""
    kind, options = CARDS[name].architecture.scheduler
    scheduler = getattr(diffusers, kind).from_config(options)
    scheduler.set_timesteps(steps)
    kernel = make_kernel(blueprint(resolve("ddpo", overrides={"model.name": name})).spec, SamplerConfig(steps=steps))
    torch.testing.assert_close(kernel.sigmas[:-1], scheduler.sigmas[:-1], rtol=0, atol=0.003)
    torch.testing.assert_close(kernel.timesteps, scheduler.timesteps.float(), rtol=0, atol=3.0)


@pytest.mark.parametrize("steps", [4, 28])
def test_the_grid_of_qwen_image_is_that_of_its_pipeline(steps):
    """Its shift grows with the picture, and its levels end at 0.02."""
    kind, options = CARDS["qwen-image"].architecture.scheduler
    scheduler = getattr(diffusers, kind).from_config(options)
    mu = calculate_shift(4096, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    kernel = flow_kernel(steps, spacing="qwen", tokens=4096, final_noise=0.0)
    assert torch.equal(kernel.sigmas, scheduler.sigmas)


@pytest.mark.parametrize("steps", [4, 28])
def test_the_grid_of_flux2_is_that_of_its_pipeline(steps):
    """Its shift depends on the number of steps too."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = compute_empirical_mu(4096, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    kernel = flow_kernel(steps, spacing="flux2", tokens=4096, final_noise=0.0)
    assert torch.equal(kernel.sigmas, scheduler.sigmas)
