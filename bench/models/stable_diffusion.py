"""Stable Diffusion 1.x and 2.x, and the embedded prior `emoji`, which has their layout."""

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from bench.models.layout import (
    AUTOENCODER,
    DIFFUSION_SCHEDULERS,
    LATENT_CHANNELS,
    SIZE,
    TOKENIZER,
    as_many,
    one_of,
)
from bench.models.pipeline import Call, Parts, PipelineModel, Shapes

UNET = AUTOENCODER | {
    "unet.in_channels": LATENT_CHANNELS,  # more: inpainting
    "unet.out_channels": LATENT_CHANNELS,
    "unet.sample_size": SIZE,
    "unet.time_cond_proj_dim": one_of(None),  # guidance as an input: latent consistency
    "unet.class_embed_type": one_of(None),
    "unet.num_class_embeds": one_of(None),
    "unet.encoder_hid_dim_type": one_of(None),
    "scheduler.prediction_type": one_of("epsilon", "v_prediction"),
    "scheduler.thresholding": one_of(False),
}


class StableDiffusion(PipelineModel):
    """A `StableDiffusionPipeline` that predicts ε or v, on its own noise schedule."""

    pipeline_class = StableDiffusionPipeline
    parts = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": TOKENIZER,
        "scheduler": DIFFUSION_SCHEDULERS,
    }
    rules = UNET | {
        "unet.addition_embed_type": one_of(None),
        "unet.cross_attention_dim": as_many(lambda c: c["text_encoder"]["hidden_size"], "the text encoder's width"),
    }
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    unused = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }

    def read_configs(self, pipe: StableDiffusionPipeline) -> None:
        """Levels as diffusers' DDIM has them, whatever sampler the folder names."""
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.alphas_cumprod, self.final_alpha = scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod)
        self.steps_offset, self.output = scheduler.config.steps_offset, scheduler.config.prediction_type

    @staticmethod
    def shapes(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Shapes:
        """See `PipelineModel.shapes`; the text has CLIP's 77 tokens."""
        size = config["sample_size"]
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (config["in_channels"], *sides), {"text": (77, config["cross_attention_dim"])}

    def encode_one(self, prompt: str) -> Parts:
        """Text states."""
        return {"text": self.pipeline.encode_prompt(prompt, self.device, 1, False)[0]}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `PipelineModel.denoise`."""
        return call(z, t, encoder_hidden_states=parts["text"], return_dict=False)[0]
