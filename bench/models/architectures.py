"""The networks of the named full-size models, as the config files of their repositories give them, and scaled down.

From these a dry run estimates memory and `bench.models.random_weights` writes stand-ins, without any file of the hub.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["full", "tiny"]
Options = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A class of diffusers or transformers, with the options that its full-size and its scaled-down config change."""

    kind: str
    full: Options
    tiny: Options


@dataclass(frozen=True)
class Architecture:
    """A pipeline's class, its networks by their names there, the scheduler's class and config, and other arguments.

    dtype: of the files.
    """

    pipeline: str
    networks: Mapping[str, Network]
    scheduler: tuple[str, Options]
    options: Options = field(default_factory=dict)
    dtype: str = "bfloat16"

    def build(self, part: str, size: Size) -> Any:
        """A network as torch initialises it; on the device "meta" without storage."""
        network = self.networks[part]
        return build(network.kind, network.full if size == "full" else network.tiny)


def build(kind: str, config: Options) -> Any:
    """The network of a class of diffusers or transformers from the entries of its config file, freshly initialised."""
    found = getattr(importlib.import_module("diffusers"), kind, None)
    if found is not None:
        return found.from_config(config)
    found = getattr(importlib.import_module("transformers"), kind)
    return found(found.config_class.from_dict(dict(config)))


def _clip(width: int, layers: int, heads: int, *, act: str = "gelu", projection: bool = False) -> Network:
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    full = size | {"num_attention_heads": heads, "hidden_act": act, "projection_dim": width}
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Network("CLIPTextModel" + "WithProjection" * projection, full, tiny | {"projection_dim": 16})


def _vae(side: int, channels: int = 4, kind: str = "AutoencoderKL", **options: Any) -> Network:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    full = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": side}
    tiny = {"block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 4}
    own = blocks | options
    return Network(kind, own | full | {"latent_channels": channels}, own | tiny | {"latent_channels": 4})


def _sd(side: int, text: Network, scheduler: tuple[str, Options], **unet: Any) -> Architecture:
    """Stable Diffusion 1.x or 2.x."""
    tiny = {"sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 1,
            "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}  # fmt: skip
    networks = {
        "vae": _vae(512),
        "text_encoder": text,
        "unet": Network("UNet2DConditionModel", {"sample_size": side} | unet, tiny),
    }
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return Architecture("StableDiffusionPipeline", networks, scheduler, options, "float32")


def _flux(guidance: bool) -> Architecture:
    """FLUX.1; guidance: as an input, with a shift that grows with the picture (dev)."""
    tiny = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
            "num_attention_heads": 2, "joint_attention_dim": 40, "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 4)}  # fmt: skip
    own = {"guidance_embeds": guidance}
    networks = {
        "vae": _vae(1024, 16, scaling_factor=0.3611, shift_factor=0.1159, **_NO_QUANT),
        "text_encoder": _clip(768, 12, 12, act="quick_gelu"),
        "text_encoder_2": _T5,
        "transformer": Network("FluxTransformer2DModel", own, own | tiny),
    }
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return Architecture("FluxPipeline", networks, (_EULER, shift))


_EULER = "FlowMatchEulerDiscreteScheduler"
_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_T5 = Network(
    "T5EncoderModel",
    {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
     "feed_forward_proj": "gated-gelu"},
    {"vocab_size": 128, "d_model": 40, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
)  # fmt: skip
_V_PREDICTION = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}

ARCHITECTURES: dict[str, Architecture] = {
    "sd15": _sd(
        64,
        _clip(768, 12, 12, act="quick_gelu"),
        ("PNDMScheduler", _NOISE | {"skip_prk_steps": True}),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    "sd21": _sd(
        96,
        _clip(1024, 23, 16),
        ("DDIMScheduler", _NOISE | _V_PREDICTION),
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        {
            "vae": _vae(1024, scaling_factor=0.13025, force_upcast=True),
            "text_encoder": _clip(768, 12, 12, act="quick_gelu"),
            "text_encoder_2": _clip(1280, 32, 20, projection=True),
            "unet": Network(
                "UNet2DConditionModel",
                {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                 "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
                 "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": 2816},
                {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 32,
                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
                 "norm_num_groups": 4, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                 "projection_class_embeddings_input_dim": 16 + 6 * 4},
            ),
        },
        ("EulerDiscreteScheduler", _NOISE | {"timestep_spacing": "leading", "set_alpha_to_one": False}),
        dtype="float32",
    ),
    "sd35_medium": Architecture(
        "StableDiffusion3Pipeline",
        {
            "vae": _vae(1024, 16, scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT),
            "text_encoder": _clip(768, 12, 12, act="quick_gelu", projection=True),
            "text_encoder_2": _clip(1280, 32, 20, projection=True),
            "text_encoder_3": _T5,
            "transformer": Network(
                "SD3Transformer2DModel",
                {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
                 "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
                 "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
                {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
                 "num_attention_heads": 2, "joint_attention_dim": 40, "caption_projection_dim": 16,
                 "pooled_projection_dim": 32, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
                 "dual_attention_layers": (0,)},
            ),
        },
        (_EULER, {"shift": 3.0}),
    ),
    "flux_schnell": _flux(guidance=False),
    "flux_dev": _flux(guidance=True),
    "flux2_klein": Architecture(
        "Flux2KleinPipeline",
        {
            "vae": _vae(1024, 32, "AutoencoderKLFlux2"),
            "text_encoder": Network(
                "Qwen3ForCausalLM",
                {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
                {"vocab_size": 128, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 27,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True},
            ),
            "transformer": Network(
                "Flux2Transformer2DModel",
                {"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
                 "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
                 "guidance_embeds": False},
                {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                 "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4),
                 "timestep_guidance_channels": 16, "guidance_embeds": False},
            ),
        },
        (_EULER, {"shift": 3.0, "use_dynamic_shifting": True}),
    ),
}  # fmt: skip
