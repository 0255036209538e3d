"""FLUX.2 klein."""

from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn

from bench.models.family import Call, Parts
from bench.models.flux import side
from bench.models.pipeline import PipelineModel
from bench.models.rules import FLOW_SCHEDULER, FLOW_SCHEDULERS, QWEN_TOKENIZER, Configs, equals, one_of
from bench.models.spec import PipelineSpec

TOKENS = 512  # of text: the pipeline's default


class Flux2Klein(PipelineModel):
    """A `Flux2KleinPipeline`: a rectified flow on normalised latents, 2×2 of the autoencoder's to one of the flow's.

    The text states are those of three layers of a language model. Of the two kinds of blocks the single ones have one
    fused projection, which holds attention's three and the first of the feed-forward network.
    """

    pipeline_class = Flux2KleinPipeline
    parts = {
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": QWEN_TOKENIZER,
        "scheduler": FLOW_SCHEDULERS,
    }
    rules = FLOW_SCHEDULER | {
        "transformer.in_channels": equals(
            lambda c: 4 * c["vae"]["latent_channels"], "four times the autoencoder's channels"
        ),
        "transformer.joint_attention_dim": equals(
            lambda c: 3 * c["text_encoder"]["hidden_size"], "three times the text encoder's width"
        ),
        "transformer.guidance_embeds": one_of(False),
        "scheduler.time_shift_type": one_of("exponential"),
    }
    denoiser = "transformer"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",
    )

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The transformer's latents have half the side of the autoencoder's."""
        config, half = configs["transformer"], side(configs["vae"]) // 2
        return PipelineSpec(
            latent_shape=(config["in_channels"], half, half),
            conditioning={"text": (TOKENS, config["joint_attention_dim"])},
            guided=not configs["pipeline"].get("is_distilled"),
            output="flow",
            spacing="flux2",
            tokens=half**2,
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states."""
        return {"text": self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=TOKENS)[0]}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`; positions are (0, row, column, 0), and (0, 0, 0, i) of the text."""
        picture = torch.zeros(*z.shape[2:], 4, device=z.device, dtype=torch.long)
        picture[..., 1] += torch.arange(z.shape[2], device=z.device)[:, None]
        picture[..., 2] += torch.arange(z.shape[3], device=z.device)
        text = torch.zeros(parts["text"].shape[1], 4, device=z.device, dtype=torch.long)
        text[:, 3] += torch.arange(len(text), device=z.device)
        output = call(
            hidden_states=z.flatten(2).transpose(1, 2),
            timestep=t / 1000,
            encoder_hidden_states=parts["text"],
            txt_ids=text,
            img_ids=picture.flatten(0, 1),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, z.shape[2:])

    @staticmethod
    def vae_latents(z: Tensor, vae: Any) -> Tensor:
        """See `Family.vae_latents`: by the autoencoder's running statistics, and four channels to 2×2 places."""
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        z = z * std + vae.bn.running_mean.view(1, -1, 1, 1)
        return nn.functional.pixel_shuffle(z, 2)
