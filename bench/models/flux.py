"""FLUX.1 dev and schnell."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from bench.models.family import Call, Parts
from bench.models.pipeline import PipelineModel
from bench.models.rules import AUTOENCODER, FLOW_SCHEDULER, FLOW_SCHEDULERS, TOKENIZER, Configs, equals, fixed
from bench.models.spec import PipelineSpec

T5_TOKENS = 512


class Flux(PipelineModel):
    """A `FluxPipeline`: a rectified flow on latents that the transformer sees packed, 2×2 to a token.

    Guidance is an input of the network (dev) or none at all (schnell), so there is no second row of an empty prompt.
    """

    pipeline_class = FluxPipeline
    parts = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer": TOKENIZER,
        "tokenizer_2": TOKENIZER,
        "scheduler": FLOW_SCHEDULERS,
    }
    rules = (
        AUTOENCODER
        | FLOW_SCHEDULER
        | {
            "transformer.in_channels": equals(
                lambda c: 4 * c["vae"]["latent_channels"], "four times the autoencoder's channels"
            ),
            "transformer.joint_attention_dim": equals(lambda c: c["text_encoder_2"]["d_model"], "T5's width"),
            "transformer.pooled_projection_dim": equals(lambda c: c["text_encoder"]["hidden_size"], "CLIP's width"),
            **fixed("scheduler", base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096),
            **fixed("scheduler", time_shift_type="exponential"),
        }
    )
    denoiser = "transformer"
    embedded_guidance = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    unused = {"image_encoder": None, "feature_extractor": None}

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The shift of dev's time grid grows with the number of tokens; schnell's levels are even."""
        config, scheduler, latent = configs["transformer"], configs["scheduler"], side(configs["vae"])
        guidance = {"guidance": ()} if config["guidance_embeds"] else {}  # a scalar a row
        return PipelineSpec(
            latent_shape=(config["in_channels"] // 4, latent, latent),
            conditioning={
                "text": (T5_TOKENS, config["joint_attention_dim"]),
                "pooled": (config["pooled_projection_dim"],),
                **guidance,
            },
            guided=config["guidance_embeds"],
            output="flow",
            spacing="flux" if scheduler["use_dynamic_shifting"] else "shifted",
            shift=scheduler["shift"],
            tokens=(latent // 2) ** 2,
        )

    def encode_one(self, prompt: str) -> Parts:
        """T5's text states, CLIP's pooled text, and the guidance."""
        text, pooled, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=T5_TOKENS)
        parts = {"text": text, "pooled": pooled}
        if self.network.config.guidance_embeds:
            parts["guidance"] = torch.full([1], self.guidance, device=self.device)
        return parts

    def pipeline_latents(self, z: Tensor) -> Tensor:
        """See `Family.pipeline_latents`; packed."""
        return pack(z)

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        rows, columns = z.shape[2] // 2, z.shape[3] // 2
        ids = torch.zeros(rows, columns, 3, device=z.device, dtype=z.dtype)
        ids[..., 1] += torch.arange(rows, device=z.device)[:, None]
        ids[..., 2] += torch.arange(columns, device=z.device)
        output = call(
            pack(z),
            encoder_hidden_states=parts["text"],
            pooled_projections=parts["pooled"],
            timestep=t / 1000,
            guidance=parts.get("guidance"),
            img_ids=ids.flatten(0, 1),
            txt_ids=torch.zeros(parts["text"].shape[1], 3, device=z.device, dtype=z.dtype),
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)


def side(vae: Mapping[str, Any]) -> int:
    """A latent's side, from the autoencoder's config: the transformer's names no size."""
    return vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)


def pack(z: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H/2 · W/2, 4 C], channels first within a token."""
    return z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """What `pack` made of latents [B, C, 2 rows, 2 columns]."""
    squares = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
