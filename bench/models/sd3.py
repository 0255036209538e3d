"""Stable Diffusion 3 and 3.5, and the embedded prior `emoji_flow`, which has their layout."""

from collections.abc import Mapping
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from bench.models.family import Call, Parts
from bench.models.pipeline import PipelineModel
from bench.models.rules import (
    AUTOENCODER,
    FLOW_SCHEDULER,
    FLOW_SCHEDULERS,
    LATENT_CHANNELS,
    SIDE,
    TOKENIZER,
    Configs,
    equals,
    one_of,
)
from bench.models.spec import PipelineSpec

T5_TOKENS = 256  # the pipeline's default


class StableDiffusion3(PipelineModel):
    """A `StableDiffusion3Pipeline`: a rectified flow by a transformer with joint attention to the text.

    Two CLIP encoders give the pooled text and the first text states, T5 the others. Without T5 its states are zeros, as
    in the pipeline's own call. A transformer whose text is no wider than the pooled one was made without T5 and gets
    none of its states (the pipeline's call then takes `max_sequence_length=0`).
    """

    pipeline_class = StableDiffusion3Pipeline
    parts = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": TOKENIZER,
        "tokenizer_2": TOKENIZER,
        "tokenizer_3": TOKENIZER,
        "scheduler": FLOW_SCHEDULERS,
    }
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    rules = (
        AUTOENCODER
        | FLOW_SCHEDULER
        | {
            "transformer.in_channels": LATENT_CHANNELS,
            "transformer.sample_size": SIDE,
            "transformer.pooled_projection_dim": equals(
                lambda c: c["text_encoder"]["projection_dim"] + c["text_encoder_2"]["projection_dim"],
                "as wide as both pooled texts",
            ),
            "scheduler.use_dynamic_shifting": one_of(False),
        }
    )
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    unused = {"image_encoder": None, "feature_extractor": None}

    @classmethod
    def describe(cls, configs: Configs) -> PipelineSpec:
        """The text has CLIP's 77 tokens and T5's."""
        config = configs["transformer"]
        size, width, pooled = config["sample_size"], config["joint_attention_dim"], config["pooled_projection_dim"]
        return PipelineSpec(
            latent_shape=(config["in_channels"], size, size),
            conditioning={"text": (77 + _t5_tokens(config), width), "pooled": (pooled,)},
            output="flow",
            spacing="sd3",
            shift=configs["scheduler"]["shift"],
        )

    def encode_one(self, prompt: str) -> Parts:
        """Text states and pooled text."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_t5_tokens(self.network.config),
        )
        return {"text": text, "pooled": pooled}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        return call(z, parts["text"], parts["pooled"], t, return_dict=False)[0]


def _t5_tokens(config: Mapping[str, Any]) -> int:
    return T5_TOKENS if config["joint_attention_dim"] > config["pooled_projection_dim"] else 0
