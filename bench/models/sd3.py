"""Stable Diffusion 3 and 3.5, and the embedded prior `emoji_flow`, which has their layout."""

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
    Rule,
    equals,
    one_of,
)
from bench.models.spec import PipelineSpec

CLIP_TOKENS = 77
T5_TOKENS = 256  # the pipeline's default
T5 = "text_encoder_3"


def _holds_the_text(width: int, configs: Configs) -> bool:
    clip = configs["text_encoder"]["hidden_size"] + configs["text_encoder_2"]["hidden_size"]
    return clip <= width and (T5 not in configs or width == configs[T5]["d_model"])


class StableDiffusion3(PipelineModel):
    """A `StableDiffusion3Pipeline`: a rectified flow by a transformer with joint attention to the text.

    Two CLIP encoders give the pooled text and the first text states, T5 the others. Where T5 is left out, its states
    are zeros, as in the pipeline's own call. A pipeline that never had T5, and whose transformer takes text no wider
    than CLIP's, has none of its states (the pipeline's call then takes `max_sequence_length=0`).
    """

    pipeline_class = StableDiffusion3Pipeline
    parts = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        T5: ("T5EncoderModel",),
        "tokenizer": TOKENIZER,
        "tokenizer_2": TOKENIZER,
        "tokenizer_3": TOKENIZER,
        "scheduler": FLOW_SCHEDULERS,
    }
    optional = frozenset({T5, "tokenizer_3"})
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
            "transformer.joint_attention_dim": Rule(_holds_the_text, "T5's width, and hold both CLIP encoders' states"),
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
        _, t5 = configs["pipeline"].get(T5, (None, None))  # the index names it also where `model.t5` leaves it out
        states = T5_TOKENS if t5 or width > pooled else 0
        return PipelineSpec(
            latent_shape=(config["in_channels"], size, size),
            conditioning={"text": (CLIP_TOKENS + states, width), "pooled": (pooled,)},
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
            max_sequence_length=self.spec.conditioning["text"][0] - CLIP_TOKENS,
        )
        return {"text": text, "pooled": pooled}

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """See `Family.denoise`."""
        return call(z, parts["text"], parts["pooled"], t, return_dict=False)[0]
