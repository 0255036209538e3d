"""Sampling: named noise, agreement with diffusers, replay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from bench.diagnose.selftest.scaffold import perturb
from bench.errors import BenchError
from bench.sampling.grids import ddim_kernel, flow_kernel
from bench.sampling.kernel import gaussian_log_prob
from bench.sampling.noise import Noise, generator
from bench.sampling.trajectory import Batch, rollout

SAMPLES = [("a cat", 0), ("a cat", 1), ("dog", 0)]


def test_noise_is_a_function_of_its_name():
    noise = Noise(3, "train", SAMPLES)
    assert torch.equal(noise(2, (4, 4)), Noise(3, "train", SAMPLES)(2, (4, 4)))
    assert torch.equal(noise(2, (4, 4))[1:], Noise(3, "train", SAMPLES[1:])(2, (4, 4)))
    for (prompt, index), row in zip(SAMPLES, noise(5, (3, 3)).numpy(), strict=True):
        alone = generator(3, "train", prompt, index, step=5).standard_normal((3, 3), np.float32)
        assert np.array_equal(alone, row)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    noise(0, (4,))
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002


def test_noise_streams_are_independent_and_normal():
    # Neighbouring steps must not be shifted copies of one stream, as they would be with the step in the low counter.
    streams = [generator(0, "train", "cat", 0, step=k).standard_normal(4096) for k in range(4)]
    streams += [generator(s, p, "cat", 0).standard_normal(4096) for s, p in ((1, "train"), (0, "evaluate"))]
    for i, a in enumerate(streams):
        assert abs(a.mean()) < 5 / 64
        assert abs(a.std() - 1) < 5 / 90
        for b in streams[:i]:
            assert len(np.intersect1d(a, b)) == 0
            assert abs((a * b).mean()) < 5 / 64


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_grids_are_those_of_diffusers(spacing):
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for steps in (1, 3, 7, 20, 50, 999):
        theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        theirs.set_timesteps(steps)
        assert torch.equal(ddim_kernel(table, steps, spacing=spacing, steps_offset=1).timesteps, theirs.timesteps)


TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@pytest.mark.parametrize(
    "kernel, step, share",
    [
        (flow_kernel(10, spacing="sd3"), 8, 952 / 957),
        (flow_kernel(20, spacing="shifted", final_noise=0.06), 19, 3.82 / 7.36),
        (ddim_kernel(TABLE, 20), 18, 29.5 / 40.4),
        (ddim_kernel(TABLE, 20, output="v_prediction", rule="sde"), None, None),
    ],
)
def test_the_heaviest_step_is_that_of_the_means_slope(kernel, step, share):
    weights = []
    for k in range(kernel.steps):
        z, output = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(k)).requires_grad_()
        (slope,) = torch.autograd.grad(kernel.mean(z, output, k).sum(), output)
        weights.append(float(slope[0, 0] / kernel.std(k, z)) ** 2)
    found = kernel.largest_weight()
    assert found == (int(np.argmax(weights)), pytest.approx(max(weights) / sum(weights), rel=1e-5))
    if step is not None:
        assert found == (step, pytest.approx(share, abs=0.005))


@pytest.mark.parametrize("output", ["epsilon", "flow"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_leak_is_what_remains_of_the_first_noise(output, eta):
    """Points of unit variance, whose denoiser is exact: the regression of the finished sample on the first noise."""
    kernel = ddim_kernel(TABLE, 20, eta=eta) if output == "epsilon" else flow_kernel(20, eta=eta)
    noise = torch.Generator().manual_seed(0)
    first = z = torch.randn(200_000, 1, generator=noise)
    for k in range(kernel.steps):
        alpha, s = kernel.alpha_cumprod(k, z) ** 0.5, kernel.noise_level(k, z)
        mean = kernel.target(alpha * z / (alpha**2 + s**2), s * z / (alpha**2 + s**2), k)
        z = kernel.mean(z, mean, k) + kernel.std(k, z) * torch.randn(z.shape, generator=noise)
    slope = float((first * z).mean() / first.square().mean())
    variances = [kernel.alpha_cumprod(k, z) + kernel.noise_level(k, z) ** 2 for k in (0, kernel.steps)]
    assert kernel.leak() == pytest.approx(slope**2 * float(variances[0] / variances[1]), abs=0.006)
    assert (kernel.leak() > 0.05) == (eta < 1)


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_step_is_that_of_diffusers_ddim(spacing, eta):
    theirs = DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing
    )
    theirs.set_timesteps(8)  # divides 1000: otherwise diffusers' trailing steps do not end at the next grid point
    kernel = ddim_kernel(theirs.alphas_cumprod, 8, eta=eta, spacing=spacing, steps_offset=1)
    rng = np.random.default_rng(0)
    for k, t in enumerate(theirs.timesteps):
        z, eps, noise = (torch.from_numpy(rng.standard_normal((3, 4, 5, 5))) for _ in range(3))
        found = kernel.mean(z, eps, k) + kernel.std(k, z) * noise
        expected = theirs.step(eps, t, z, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("spacing", "extra"), [("linspace", 0), ("logsnr", 1)])
def test_every_step_is_that_of_first_order_sde_dpm_solver(spacing, extra):
    """On diffusers' log-SNR grid the last of its steps goes from `ᾱ_0` to `ᾱ_0` and is not counted."""
    theirs = DPMSolverMultistepScheduler(
        **SCHEDULE,
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        final_sigmas_type="sigma_min",
        use_lu_lambdas=spacing == "logsnr",
        timestep_spacing="linspace",
    )
    steps = 20
    theirs.set_timesteps(steps + extra)
    kernel = ddim_kernel(theirs.alphas_cumprod.double(), steps, eta=1.0, spacing=spacing)
    assert torch.equal(kernel.timesteps, theirs.timesteps[:steps])
    assert kernel.has_density
    if spacing == "logsnr":
        levels = torch.log(kernel.alphas_cumprod / (1 - kernel.alphas_cumprod))
        torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(steps), rtol=1e-9, atol=0)
    rng = np.random.default_rng(0)
    for k, t in enumerate(theirs.timesteps[:steps]):
        z, eps, noise = (torch.from_numpy(rng.standard_normal((3, 4, 5, 5))) for _ in range(3))
        found = kernel.mean(z, eps, k) + kernel.std(k, z) * noise
        expected = theirs.step(eps, t, z, variance_noise=noise).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # its own tables are float32


def test_a_log_snr_grid_needs_a_finite_end():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    with pytest.raises(BenchError, match="final_alpha < 1"):
        ddim_kernel(table, 5, spacing="logsnr", final_alpha=1.0)


@pytest.mark.parametrize(("steps", "final_noise"), [(1, 0.06), (5, 0.1), (20, 0.06)])
def test_a_flows_log_snr_grid_is_even_after_its_first_step(steps, final_noise):
    kernel = flow_kernel(steps, spacing="logsnr", final_noise=final_noise, dtype=torch.float64)
    levels = torch.cat([kernel.timesteps / 1000, torch.tensor([final_noise])])
    assert levels[0] == 1
    assert steps == 1 or float(levels[1]) == pytest.approx(steps / (steps + 1))
    gaps = torch.logit(levels[1:]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(len(gaps)), rtol=1e-5, atol=1e-6)
    if steps == 20:
        assert (
            kernel.largest_weight()[1]
            < 0.3
            < flow_kernel(steps, spacing="shifted", final_noise=0.06).largest_weight()[1]
        )
    with pytest.raises(BenchError, match="final_noise > 0"):
        flow_kernel(steps, spacing="logsnr", final_noise=0.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rollout_equals_diffusers_pipeline(pipeline_folder, model, eta):
    steps = 10
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    kernel = ddim_kernel(model.spec.alphas_cumprod, steps, eta=eta, steps_offset=1, final_alpha=model.spec.final_alpha)
    noise = Noise(0, "evaluate", SAMPLES)

    class NamedNoise(DDIMScheduler):
        """diffusers' own step, fed our noise."""

        def step(self, model_output, timestep, sample, eta=0.0, return_dict=True):  # the pipeline looks for `eta`
            named = noise(int((self.timesteps == timestep).nonzero()) + 1, model.latent_shape)
            return super().step(model_output, timestep, sample, eta=eta, variance_noise=named, return_dict=return_dict)

    pipe.scheduler = NamedNoise.from_config(pipe.scheduler.config)
    conditioning = model.encode([prompt for prompt, _ in SAMPLES])
    theirs = pipe(
        **model.pipeline_inputs(conditioning),
        num_inference_steps=steps,
        eta=eta,
        latents=noise(0, model.latent_shape),
        output_type="latent",
    ).images
    batch = Batch([prompt for prompt, _ in SAMPLES], SAMPLES, conditioning)
    ours = rollout(model, kernel, batch, noise).latents[:, -1]
    assert torch.equal(ours, theirs)


def test_replay_gives_stored_log_probs(core):
    perturb(core.model)
    record = frozenset({"log_prob", "model_output", "prior_output"})
    with torch.no_grad():
        data = core.rollout(core.batch(SAMPLES), record=record)
    steps = torch.arange(core.kernel.steps).expand(len(SAMPLES), -1)
    for part in data.transitions(steps, len(SAMPLES)):  # one step a part, as in the rollout: equal to the bit
        eps = core.predict(part.z, part.k, part.conditioning)
        mean = core.kernel.mean(part.z, eps, part.k)
        log_prob = gaussian_log_prob(part.z_next, mean, core.kernel.std(part.k, part.z))
        assert torch.equal(eps, part.model_output)
        assert torch.equal(log_prob, part.log_prob)
        prior = core.predict(part.z, part.k, part.conditioning, prior=True)
        assert torch.equal(prior, part.prior_output)
        assert not torch.equal(prior, eps)
    for part in data.transitions(steps, 4):  # other batch compositions
        eps = core.predict(part.z, part.k, part.conditioning)
        mean = core.kernel.mean(part.z, eps, part.k)
        log_prob = gaussian_log_prob(part.z_next, mean, core.kernel.std(part.k, part.z))
        ratio = torch.exp((log_prob - part.log_prob) / part.z[0].numel())
        assert (ratio - 1).abs().max() < 1e-6


def test_grad_from_and_stop_at(core):
    perturb(core.model)
    batch = core.batch(SAMPLES)
    whole = core.rollout(batch).latents
    short = core.rollout(batch, stop_at=3).latents
    assert torch.equal(short, whole[:, :4])
    assert not whole.requires_grad
    grad = core.rollout(batch, grad_from=3).latents
    assert grad.requires_grad
    torch.testing.assert_close(grad, whole, rtol=1e-5, atol=1e-5)  # without a graph the adapters are merged


def test_the_rewards_gradient_is_taken_a_few_rows_at_a_time(core, monkeypatch):
    """Value and gradient are those of one graph over all rows, here under a loss that is not linear in the reward."""
    z, prompts = torch.randn(5, *core.model.latent_shape, generator=torch.Generator().manual_seed(0)), list("abcde")
    whole = z.clone().requires_grad_()
    expected = core.reward_model(core.model.decode(whole), prompts)
    (slope,) = torch.autograd.grad(expected.sum(), whole, retain_graph=True)
    (squared,) = torch.autograd.grad(expected.square().sum(), whole)
    sizes, decode = [], core.model.decode
    monkeypatch.setattr(core.model, "decode", lambda part: (sizes.append(len(part)), decode(part))[1])
    core.model.decoder_batch = 2
    rewards, gradient = core.reward_gradient(z, prompts)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(rewards, expected.detach())
    torch.testing.assert_close(gradient, slope)
    moving = z.clone().requires_grad_()
    rewards = core.reward(2 * (moving / 2), prompts)
    assert sizes == 2 * [2, 2, 1]
    torch.testing.assert_close(rewards, expected)
    torch.testing.assert_close(torch.autograd.grad(rewards.square().sum(), moving)[0], squared)
    with torch.no_grad():
        core.reward(moving, prompts)
    assert sizes[-1] == 5  # without a graph all at once


@pytest.mark.parametrize(("pixels", "rows"), [(32, 8), (256, 8), (512, 2), (1024, 1), (2048, 1)])
def test_a_decoder_is_differentiated_half_a_megapixel_at_a_time(model, pixels, rows):
    vae = model.pipeline.vae
    side = pixels // 2 ** (len(vae.config.block_out_channels) - 1)
    assert model.decoder_rows(torch.zeros(1, 4, side, side, device="meta"), vae) == rows


@pytest.mark.parametrize(("fraction", "count"), [(0, 1), (0.1, 2), (0.5, 3), (1, 5)])
def test_a_fraction_above_zero_chooses_a_step_besides_the_last(core, fraction, count):
    steps = core.choose_steps(core.batch((f"prompt {i}", 0) for i in range(20)), fraction)
    assert steps.shape == (20, count)
    assert (steps[:, -1] == 4).all()
    assert (steps.diff(dim=1) > 0).all()


def test_a_chain_goes_on_from_a_step_as_if_it_had_not_been_cut(core):
    whole = core.rollout(core.batch(SAMPLES))
    core = replace(core, sample_batch=2)
    first = core.rollout(core.batch(SAMPLES), stop_at=2)
    rest = core.rollout(core.batch(SAMPLES), begin=(2, first.latents[:, -1]), record=frozenset({"model_output"}))
    assert rest.steps == whole.steps - 2
    torch.testing.assert_close(torch.cat([first.latents, rest.latents[:, 1:]], 1), whole.latents)
