"""Families of pipelines: each agrees with diffusers' own call. Stable Diffusion 3's is tested on the embedded prior."""

import pandas as pd
import pytest
import torch
from conftest import perturb
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from bench.models.base import DiffusionModel
from bench.models.catalogue import load_model, make_kernel
from bench.models.emoji import FLOW, WEIGHTS, shared
from bench.models.flux import pack
from bench.models.sd3 import StableDiffusion3
from bench.models.sdxl import StableDiffusionXL
from bench.sampling.kernel import Kernel
from bench.sampling.noise import Noise, seeded
from bench.sampling.trajectory import Batch, rollout
from bench.settings import ModelConfig, SamplerConfig

TEXT = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
SAMPLES = [("tiger", 0), ("tiger", 1), ("noto fox", 0)]
DETERMINISTIC = SamplerConfig(steps=5, eta=0.0, final_noise=0.0, guidance=3.0)


@pytest.fixture
def model() -> StableDiffusion3:
    return load_model(ModelConfig(name="emoji_flow", lora_rank=2), DETERMINISTIC)


def plain() -> StableDiffusion3Pipeline:
    """diffusers alone."""
    pipe = StableDiffusion3Pipeline.from_pretrained(FLOW, torch_dtype=torch.float32, **shared(FLOW))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusion3Pipeline, model: StableDiffusion3) -> torch.Tensor:
    """Latents of SAMPLES by the pipeline's own call, from prompts."""
    return pipe(
        [prompt for prompt, _ in SAMPLES],
        num_inference_steps=DETERMINISTIC.steps,
        guidance_scale=model.guidance,
        latents=Noise(0, "evaluate", SAMPLES)(0, model.latent_shape),
        max_sequence_length=0,
        output_type="latent",
    ).images


def sample(model: StableDiffusion3, samples: list[tuple[str, int]] = SAMPLES) -> torch.Tensor:
    batch = Batch([prompt for prompt, _ in samples], samples, model.encode([prompt for prompt, _ in samples]))
    with torch.no_grad():
        path = rollout(model, make_kernel(model, DETERMINISTIC), batch, Noise(0, "evaluate", samples))
    return path.latents[:, -1]


@torch.no_grad()
def test_sd3_equals_diffusers_to_the_bit(model):
    """Latents of a deterministic chain of an untrained adapter; the pipeline encodes the prompts itself, as a batch."""
    assert model.output == "flow"
    inputs = model.pipeline_inputs(model.encode([prompt for prompt, _ in SAMPLES]))
    pipe = plain()
    noise = Noise(0, "evaluate", SAMPLES)(0, model.latent_shape)
    theirs = pipe(**inputs, num_inference_steps=5, latents=noise, output_type="latent").images
    assert torch.equal(sample(model), theirs)
    torch.testing.assert_close(draw(pipe, model), theirs, rtol=1e-4, atol=1e-4)
    images = pipe(**inputs, num_inference_steps=5, latents=noise, output_type="pt").images
    torch.testing.assert_close(model.decode(theirs), images, rtol=0, atol=1e-6)


@torch.no_grad()
def test_sd3_adapter_in_diffusers(model, tmp_path):
    before = sample(model)
    perturb(model, 0.1)
    after = sample(model)
    assert (after - before).norm() > 0.01 * before.norm()
    model.save(tmp_path)
    pipe = plain()
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(pipe, model), after, rtol=1e-3, atol=1e-3)
    other = load_model(ModelConfig(name="emoji_flow", lora_rank=2), DETERMINISTIC, seed=1)
    other.load(tmp_path)
    assert torch.equal(sample(other), after)
    t, z = torch.tensor(900.0), Noise(0, "train", SAMPLES)(0, model.latent_shape)
    conditioning = model.encode([prompt for prompt, _ in SAMPLES])
    fresh = load_model(ModelConfig(name="emoji_flow", lora_rank=2), DETERMINISTIC)
    assert torch.equal(model.predict(z, t, conditioning, prior=True), fresh.predict(z, t, conditioning))


def test_sd3_rows_are_independent_and_checkpointing_changes_nothing(model):
    perturb(model, 0.1)
    alone = torch.cat([sample(model, [name]) for name in SAMPLES])
    torch.testing.assert_close(alone, sample(model), rtol=1e-4, atol=1e-4)
    kept = load_model(ModelConfig(name="emoji_flow", lora_rank=2, checkpointing=True), DETERMINISTIC)
    perturb(kept, 0.1)
    gradients = []
    for one in (model, kept):
        z = Noise(0, "train", SAMPLES)(0, one.latent_shape).requires_grad_()
        output = one.predict(z, torch.tensor([1000.0, 500.0, 20.0]), one.encode([prompt for prompt, _ in SAMPLES]))
        image = one.decode(z - output)
        gradients.append(torch.autograd.grad(image.square().sum(), [z, *one.adapters().values()]))
    for plain_gradient, recomputed in zip(*gradients, strict=True):  # images are decoded one by one there
        torch.testing.assert_close(recomputed, plain_gradient, rtol=1e-4, atol=1e-4 * float(plain_gradient.abs().max()))
    still = [name for name, g in zip(["z", *model.adapters()], gradients[0], strict=True) if not g.any()]
    assert all("transformer_blocks.7.attn.add_q_proj" in name for name in still)  # the last block's text asks nothing


@torch.no_grad()
def test_a_perfect_velocity_recovers_the_clean_latent(model):
    kernel = make_kernel(model, SamplerConfig(steps=5, eta=1.0))
    clean, noise = (Noise(0, "train", SAMPLES)(k, model.latent_shape) for k in range(2))
    for k in range(kernel.steps):
        s = kernel.sigmas[k]
        z = (1 - s) * clean + s * noise
        torch.testing.assert_close(kernel.clean(z, noise - clean, k), clean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kernel.noise(z, noise - clean, k), noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["nabla_gfn", "ddpo", "draft_1", "adjoint_matching"])
def test_methods_end_to_end_on_the_flow_prior(bench, tmp_path, monkeypatch, method):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = [
        "prompts.limit=2", "train.prompts_per_round=2", "train.samples_per_prompt=2", "train.updates_per_round=1",
        "sampler.steps=3", "evaluation.train_prompts=2", "evaluation.heldout_prompts=0",
        "evaluation.samples_per_prompt=2", "evaluation.metrics=[reward,path_kl]", "evaluation.rewards=[]",
    ]  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "run"
    status, text = bench("run", "--method", method, "--model", "emoji_flow", "--updates", 1, "--out", out, *sets)
    assert status == 0, text
    rows = pd.read_parquet(out / "rows.parquet").set_index("metric")
    assert rows.loc["path_kl", "value"] > 0
    assert set(rows["model"]) == {"emoji_flow"}


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    """A random `StableDiffusionXLPipeline`, small, in the real layout."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id} | TEXT
    words |= {"eos_token_id": tokenizer.eos_token_id, "projection_dim": 12}
    folder = tmp_path_factory.mktemp("sdxl")
    with seeded(0, "sdxl"):
        unet = UNet2DConditionModel(
            sample_size=(8, 16),
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        )
        vae = AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
        encoders = (CLIPTextModel(CLIPTextConfig(hidden_size=8, **words)),
                    CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, **words)))  # fmt: skip
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**levels, steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler).save_pretrained(folder)
    return folder


def sdxl(folder) -> StableDiffusionXL:
    return load_model(ModelConfig(name=str(folder), lora_rank=2), SamplerConfig(guidance=3.0))


@torch.no_grad()
def test_sdxl_equals_diffusers_to_the_bit(sdxl_folder, tmp_path):
    """A picture that is not square, prompts without and with text; then with a trained adapter, loaded by diffusers."""
    model = sdxl(sdxl_folder)
    assert model.latent_shape == (4, 8, 16)
    noise = Noise(0, "evaluate", SAMPLES)(0, model.latent_shape)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    size = {"height": 8 * pipe.vae_scale_factor, "width": 16 * pipe.vae_scale_factor}
    prompts = [prompt for prompt, _ in SAMPLES]
    kernel = make_kernel(model, SamplerConfig(steps=5, eta=0.0))

    def ours() -> torch.Tensor:
        batch = Batch(prompts, SAMPLES, model.encode(prompts))
        return rollout(model, kernel, batch, Noise(0, "evaluate", SAMPLES)).latents[:, -1]

    theirs = pipe(**model.pipeline_inputs(model.encode(prompts)) | settings | size).images
    assert torch.equal(ours(), theirs)
    torch.testing.assert_close(pipe(prompts, **settings, **size).images, theirs, rtol=1e-4, atol=1e-4)
    perturb(model, 0.1)
    assert (ours() - theirs).norm() > 0.01 * theirs.norm()
    model.save(tmp_path)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipe(prompts, **settings, **size).images, ours(), rtol=1e-3, atol=1e-3)


class ReadAsFlow:
    """A noise-predicting prior on the flow's path, as far as a rollout asks: its own time where the ratio of noise to
    signal is the same, its input rescaled to unit variance."""

    def __init__(self, model: DiffusionModel, kernel: Kernel):
        self.model, self.kernel, self.latent_shape, self.device = model, kernel, model.latent_shape, model.device

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        s = t / 1000
        k = int((noise_over_signal(self.kernel)[:-1] - s / (1 - s)).abs().argmin())
        inside = z / ((1 - s) ** 2 + s**2) ** 0.5
        noise = self.model.predict(inside, self.kernel.timesteps[k], conditioning, prior=prior, guided=guided)
        return noise - self.kernel.clean(inside, noise, k)


def noise_over_signal(kernel: Kernel) -> torch.Tensor:
    return ((1 - kernel.alphas) / kernel.alphas) ** 0.5


@torch.no_grad()
def test_a_diffusion_prior_read_as_a_flow_is_the_same_prior():
    """The same clean predictions along the chain, and the same finished samples, at equal ratios of noise to signal."""
    model = load_model(ModelConfig(name="emoji", lora_rank=2), SamplerConfig(guidance=3.0))
    diffusion = make_kernel(model, SamplerConfig(steps=6, eta=0.0))
    ratio = noise_over_signal(diffusion)
    sigmas = ratio / (1 + ratio)
    flow = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, 0.0, "ddim", "flow", sigmas)
    prompts = [prompt for prompt, _ in SAMPLES]
    batch = Batch(prompts, SAMPLES, model.encode(prompts))
    noise = Noise(0, "evaluate", SAMPLES)
    ours = rollout(model, diffusion, batch, noise, record=frozenset({"model_output"}))
    # the flow's path at its first level is shorter than a diffusion's by this factor
    size = ((1 - sigmas) ** 2 + sigmas**2) ** 0.5

    def scaled(step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return noise(step, shape) * size[0]

    theirs = rollout(ReadAsFlow(model, diffusion), flow, batch, scaled, record=frozenset({"model_output"}))
    for k in range(6):
        clean = diffusion.clean(ours.latents[:, k], ours.model_output[:, k], k)
        torch.testing.assert_close(
            flow.clean(theirs.latents[:, k], theirs.model_output[:, k], k), clean, rtol=0, atol=2e-3
        )
    torch.testing.assert_close(theirs.latents[:, -1] / size[-1], ours.latents[:, -1], rtol=0, atol=2e-3)


@pytest.fixture(scope="module", params=["dev", "schnell"])
def flux_folder(request, tmp_path_factory):
    """A random `FluxPipeline`, small, in the real layout; dev takes the guidance as an input."""
    dev = request.param == "dev"
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id} | TEXT
    folder = tmp_path_factory.mktemp(request.param)
    with seeded(0, "flux"):
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=1,
            joint_attention_dim=8, pooled_projection_dim=16, guidance_embeds=dev, axes_dims_rope=(4, 4, 4),
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, shift_factor=0.1,
                            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=16, eos_token_id=tokenizer.eos_token_id, **words))
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    FluxPipeline(scheduler, vae, clip, tokenizer, t5, tokenizer, transformer).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_flux_equals_diffusers_to_the_bit(flux_folder, tmp_path):
    """Packing, position ids, guidance as an input and each time grid; then a trained adapter, loaded by diffusers."""
    model = load_model(ModelConfig(name=str(flux_folder), lora_rank=2, lora_alpha=4), SamplerConfig(guidance=3.5))
    kernel = make_kernel(model, SamplerConfig(steps=3, eta=0.0, final_noise=0.0))
    names = SAMPLES[:2]
    noise = Noise(0, "evaluate", names)
    pipe = FluxPipeline.from_pretrained(flux_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    conditioning = model.encode([prompt for prompt, _ in names])
    settings = {"num_inference_steps": 3, "latents": pack(noise(0, model.latent_shape)), "output_type": "latent"}

    def ours() -> torch.Tensor:
        return rollout(model, kernel, Batch(["tiger"] * 2, names, conditioning), noise).latents[:, -1]

    theirs = pipe(**model.pipeline_inputs(conditioning), **settings).images
    assert torch.equal(pack(ours()), theirs)
    before = ours()
    perturb(model, 0.3)
    assert (ours() - before).norm() > 0.001 * before.norm()
    model.save(tmp_path)
    pipe.load_lora_weights(tmp_path)
    after = pipe(**model.pipeline_inputs(conditioning), **settings).images
    torch.testing.assert_close(pack(ours()), after, rtol=1e-3, atol=1e-4)
    other = load_model(ModelConfig(name=str(flux_folder), lora_rank=2, lora_alpha=4), SamplerConfig(guidance=3.5))
    other.load(tmp_path)
    assert all(torch.equal(other.adapters()[name], value) for name, value in model.adapters().items())
