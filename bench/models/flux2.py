"""FLUX.2 klein."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn

from bench.errors import BenchError
from bench.models.flux import side
from bench.models.layout import FLOW_SCHEDULER, QWEN_TOKENIZER, as_many, one_of
from bench.models.pipeline import Call, Parts, PipelineModel, Shapes

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
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    }
    rules = FLOW_SCHEDULER | {
        "transformer.in_channels": as_many(
            lambda c: 4 * c["vae"]["latent_channels"], "four times the autoencoder's channels"
        ),
        "transformer.joint_attention_dim": as_many(
            lambda c: 3 * c["text_encoder"]["hidden_size"], "three times the text encoder's width"
        ),
        "transformer.guidance_embeds": one_of(False),
        "scheduler.time_shift_type": one_of("exponential"),
    }
    denoiser = "transformer"
    output, spacing = "flow", "flux2"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",
    )

    def read_configs(self, pipe: Flux2KleinPipeline) -> None:
        """The time grid's number of tokens."""
        if self.guidance != 1 and pipe.config.get("is_distilled"):
            raise BenchError(f"{self.folder} was distilled to no guidance: use sampler.guidance=1.")
        self.tokens = (side(pipe.vae.config) // 2) ** 2

    @staticmethod
    def shapes(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Shapes:
        """See `PipelineModel.shapes`."""
        half = side(vae) // 2
        return (config["in_channels"], half, half), {"text": (TOKENS, config["joint_attention_dim"])}

    def encode_one(self, prompt: str) -> Parts:
        """Text states."""
        return {"text": self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=TOKENS)[0]}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `PipelineModel.denoise`; positions are (0, row, column, 0), and (0, 0, 0, i) of the text."""
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
    def vae_latents(z: Tensor, vae: nn.Module) -> Tensor:
        """See `PipelineModel.vae_latents`: by the autoencoder's running statistics, and four channels to 2×2 places."""
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        z = z * std + vae.bn.running_mean.view(1, -1, 1, 1)
        return nn.functional.pixel_shuffle(z, 2)
