"""Stable Diffusion XL."""

from dataclasses import replace

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from bench.model import Conditioning
from bench.models.family import Call, Parts
from bench.models.rules import TOKENIZER, Configs, equals, one_of
from bench.models.spec import PipelineSpec
from bench.models.stable_diffusion import UNET, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """A `StableDiffusionXLPipeline`: two text encoders, pooled text and the picture's size beside the text states.

    The sizes are those of a whole picture without a crop, the defaults of the pipeline's own call. The decoder runs in
    float32, as in all families; the original autoencoder needs it.
    """

    pipeline_class = StableDiffusionXLPipeline
    parts = StableDiffusion.parts | {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": TOKENIZER,
    }
    rules = UNET | {
        "unet.addition_embed_type": one_of("text_time"),
        "unet.cross_attention_dim": equals(
            lambda c: c["text_encoder"]["hidden_size"] + c["text_encoder_2"]["hidden_size"],
            "as wide as both text encoders",
        ),
        "unet.projection_class_embeddings_input_dim": equals(
            lambda c: c["text_encoder_2"]["projection_dim"] + 6 * c["unet"]["addition_time_embed_dim"],
            "as wide as the pooled text and six numbers",
        ),
    }
    unused = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """See `StableDiffusion.describe`; with pooled text and six sizes."""
        spec, unet = super().describe(configs), configs["unet"]
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        return replace(spec, conditioning={**spec.conditioning, "pooled": (pooled,), "time_ids": (6,)})

    def encode_one(self, prompt: str) -> Parts:
        """Text states, pooled text, and the sizes (height, width, no crop, height, width)."""
        text, _, pooled, _ = self.pipeline.encode_prompt(prompt, device=self.device, do_classifier_free_guidance=False)
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.dtype, device=self.device)
        return {"text": text, "pooled": pooled, "time_ids": sizes}

    def unconditional(self) -> Conditioning:
        """Zeros instead of the empty prompt's text, where the pipeline's config says so."""
        null = super().unconditional()
        if self.pipeline.config.force_zeros_for_empty_prompt and not self.config.negative_prompt:
            zeros = {name: torch.zeros_like(null.parts[name]) for name in ("text", "pooled")}
            null = Conditioning(null.parts | zeros)
        return null

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        added = {"text_embeds": parts["pooled"], "time_ids": parts["time_ids"]}
        return call(z, t, encoder_hidden_states=parts["text"], added_cond_kwargs=added, return_dict=False)[0]
