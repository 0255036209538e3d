"""Stable Diffusion XL."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from bench.model import Conditioning
from bench.models.layout import TOKENIZER, as_many, one_of
from bench.models.pipeline import Call, Parts, Shapes
from bench.models.stable_diffusion import UNET, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """A `StableDiffusionXLPipeline`: two text encoders, pooled text and the picture's size beside the text states.

    Sizes are those of a whole picture without a crop, as the pipeline's own call has them by default. The decoder runs
    in float32, as all families' do, which the original one needs.
    """

    pipeline_class = StableDiffusionXLPipeline
    parts = StableDiffusion.parts | {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": TOKENIZER,
    }
    rules = UNET | {
        "unet.addition_embed_type": one_of("text_time"),
        "unet.cross_attention_dim": as_many(
            lambda c: c["text_encoder"]["hidden_size"] + c["text_encoder_2"]["hidden_size"],
            "as wide as both text encoders",
        ),
        "unet.projection_class_embeddings_input_dim": as_many(
            lambda c: c["text_encoder_2"]["projection_dim"] + 6 * c["unet"]["addition_time_embed_dim"],
            "as wide as the pooled text and six numbers",
        ),
    }
    unused = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}

    @staticmethod
    def shapes(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Shapes:
        """See `PipelineModel.shapes`."""
        shape, parts = StableDiffusion.shapes(config, vae)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return shape, parts | {"pooled": (pooled,), "time_ids": (6,)}

    def encode_one(self, prompt: str) -> Parts:
        """Text states, pooled text, and the sizes (height, width, no crop, height, width)."""
        text, _, pooled, _ = self.pipeline.encode_prompt(prompt, device=self.device, do_classifier_free_guidance=False)
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.dtype, device=self.device)
        return {"text": text, "pooled": pooled, "time_ids": sizes}

    def unconditional(self) -> Conditioning:
        """Zeros in the place of the empty prompt's text, where the pipeline's config says so."""
        null = super().unconditional()
        if self.pipeline.config.force_zeros_for_empty_prompt and not self.negative_prompt:
            zeros = {name: torch.zeros_like(null.parts[name]) for name in ("text", "pooled")}
            null = Conditioning(null.parts | zeros)
        return null

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `PipelineModel.denoise`."""
        added = {"text_embeds": parts["pooled"], "time_ids": parts["time_ids"]}
        return call(z, t, encoder_hidden_states=parts["text"], added_cond_kwargs=added, return_dict=False)[0]
