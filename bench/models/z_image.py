"""Z-Image and Z-Image-Turbo."""

from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from bench.models.family import Call, Parts, padded
from bench.models.flux import side
from bench.models.pipeline import PipelineModel
from bench.models.rules import (
    AUTOENCODER,
    FLOW_SCHEDULER,
    FLOW_SCHEDULERS,
    LATENT_CHANNELS,
    QWEN_TOKENIZER,
    Configs,
    equals,
    one_of,
)
from bench.models.spec import PipelineSpec

TOKENS = 512  # of text: the pipeline's default


class ZImage(PipelineModel):
    """A `ZImagePipeline`: a rectified flow by a transformer with one stream of text and picture.

    The network counts time from noise to picture and predicts the velocity in that direction. It takes a list of texts
    of any lengths, so the mask of a text stays on the CPU, where reading it makes no GPU wait.
    """

    pipeline_class = ZImagePipeline
    parts = {
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": QWEN_TOKENIZER,
        "scheduler": FLOW_SCHEDULERS,
    }
    rules = (
        AUTOENCODER
        | FLOW_SCHEDULER
        | {
            "transformer.in_channels": LATENT_CHANNELS,
            "transformer.cap_feat_dim": equals(lambda c: c["text_encoder"]["hidden_size"], "the text encoder's width"),
            "transformer.siglip_feat_dim": one_of(None),
            "scheduler.use_dynamic_shifting": one_of(False),
        }
    )
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    host = frozenset({"mask"})
    alone = True

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The levels are even before the shift."""
        config, latent = configs["transformer"], side(configs["vae"])
        return PipelineSpec(
            latent_shape=(config["in_channels"], latent, latent),
            conditioning={"text": (TOKENS, config["cap_feat_dim"]), "mask": (TOKENS,)},
            output="flow",
            spacing="shifted",
            shift=configs["scheduler"]["shift"],
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states, and their mask on the CPU: 1 for a token, 0 for padding."""
        (text,), _ = self.pipeline.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        parts = padded(text[None], TOKENS)
        return parts | {"mask": parts["mask"].cpu()}

    @classmethod
    def call_texts(cls, parts: Parts) -> dict[str, Any]:
        """See `Family.call_texts`."""
        return {"prompt_embeds": _tokens(parts)}

    @staticmethod
    def call_guidance(scale: float) -> dict[str, Any]:
        """See `Family.call_guidance`; the pipeline counts from the conditional output on."""
        return {"guidance_scale": scale - 1}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        output = call(list(z.unsqueeze(2)), (1000 - t) / 1000, _tokens(parts), return_dict=False)[0]
        return -torch.stack(list(output)).squeeze(2)


def _tokens(parts: Parts) -> list[Tensor]:
    """The texts [n, width] without their padding."""
    return [text[:n] for text, n in zip(parts["text"], parts["mask"].count_nonzero(1).tolist(), strict=True)]
