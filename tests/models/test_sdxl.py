"""Stable Diffusion XL: a picture that is not square."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from example_families import SAMPLES
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bench.diagnose.selftest.scaffold import perturb
from bench.models.catalogue import load_model, make_kernel
from bench.models.emoji import WEIGHTS
from bench.models.sdxl import StableDiffusionXL
from bench.sampling.noise import Noise, seeded
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

TEXT = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}


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
    return load_model(ModelConfig(name=str(folder), lora=LoraConfig(rank=2)), SamplerConfig(guidance=3.0))


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
    kernel = make_kernel(model.spec, SamplerConfig(steps=5, eta=0.0))

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
