"""The networks of a pipeline, written down as the config files of its repository have them, and scaled down.

A dry run estimates memory from them, and `bench.models.random_weights` writes stand-ins, without any file of the hub.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["full", "tiny"]
Options = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A class of diffusers or transformers, and the options that the full-size and the scaled-down config set."""

    kind: str
    full: Options
    tiny: Options


@dataclass(frozen=True)
class Architecture:
    """A pipeline's class, its networks by the pipeline's names, and its scheduler's class and config.

    options: further arguments of the pipeline's class. dtype: of the files.
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
    """A network of a class of diffusers or transformers from the entries of its config file, freshly initialised."""
    diffusers_class = getattr(importlib.import_module("diffusers"), kind, None)
    if diffusers_class is not None:
        return diffusers_class.from_config(config)
    transformers_class = getattr(importlib.import_module("transformers"), kind)
    return transformers_class(transformers_class.config_class.from_dict(dict(config)))


def clip_text(width: int, layers: int, heads: int, *, act: str = "gelu", projection: bool = False) -> Network:
    """A text encoder of CLIP."""
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    full = size | {"num_attention_heads": heads, "hidden_act": act, "projection_dim": width}
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Network("CLIPTextModel" + "WithProjection" * projection, full, tiny | {"projection_dim": 16})


def autoencoder(side: int, channels: int = 4, kind: str = "AutoencoderKL", **options: Any) -> Network:
    """An autoencoder of pictures of `side` pixels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    full = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": side}
    tiny = {"block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 4}
    both = blocks | options
    return Network(kind, both | full | {"latent_channels": channels}, both | tiny | {"latent_channels": 4})


CLIP_L = clip_text(768, 12, 12, act="quick_gelu")
T5_XXL = Network(
    "T5EncoderModel",
    {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
     "feed_forward_proj": "gated-gelu"},
    {"vocab_size": 128, "d_model": 40, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
)  # fmt: skip
NO_QUANT_CONV: Options = {"use_quant_conv": False, "use_post_quant_conv": False}  # of the autoencoder
EULER_FLOW = "FlowMatchEulerDiscreteScheduler"
SOLVER: Options = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}  # of a flow
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
