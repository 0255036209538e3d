"""Stable Diffusion 1.x and 2.x, and the embedded prior `emoji`, which has their layout."""

from typing import Any, ClassVar

from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from bench.models.family import Call, Parts
from bench.models.pipeline import PipelineModel
from bench.models.rules import (
    AUTOENCODER,
    DIFFUSION_SCHEDULERS,
    LATENT_CHANNELS,
    SIZE,
    TOKENIZER,
    Configs,
    equals,
    one_of,
)
from bench.models.spec import PipelineSpec

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

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    parts = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": TOKENIZER,
        "scheduler": DIFFUSION_SCHEDULERS,
    }
    rules = UNET | {
        "unet.addition_embed_type": one_of(None),
        "unet.cross_attention_dim": equals(lambda c: c["text_encoder"]["hidden_size"], "the text encoder's width"),
    }
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    unused = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """Levels as diffusers' DDIM has them, whatever sampler the folder names; the text has CLIP's 77 tokens."""
        unet, scheduler = configs["unet"], DDIMScheduler.from_config(configs["scheduler"])
        size = unet["sample_size"]
        return PipelineSpec(
            latent_shape=(unet["in_channels"], *((size, size) if isinstance(size, int) else size)),
            conditioning={"text": (77, unet["cross_attention_dim"])},
            output=scheduler.config.prediction_type,
            alphas_cumprod=scheduler.alphas_cumprod,
            final_alpha=float(scheduler.final_alpha_cumprod),
            steps_offset=scheduler.config.steps_offset,
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states."""
        return {"text": self.pipeline.encode_prompt(prompt, self.device, 1, False)[0]}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        return call(z, t, encoder_hidden_states=parts["text"], return_dict=False)[0]
