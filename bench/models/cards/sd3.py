"""Stable Diffusion 3.5."""

from bench.models.architecture import (
    EULER_FLOW,
    NO_QUANT_CONV,
    T5_XXL,
    Architecture,
    Network,
    autoencoder,
    clip_text,
)
from bench.models.card import HubCard

TRANSFORMER = Network(
    "SD3Transformer2DModel",
    {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
     "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
     "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
     "num_attention_heads": 2, "joint_attention_dim": 40, "caption_projection_dim": 16,
     "pooled_projection_dim": 32, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
     "dual_attention_layers": (0,)},
)  # fmt: skip

CARDS = (
    HubCard(
        "sd35_medium",
        "Stable Diffusion 3.5 Medium (flow); gated; not yet run here",
        "Stability AI Community License",
        hub="stabilityai/stable-diffusion-3.5-medium",
        size=16_300_000_000,
        architecture=Architecture(
            "StableDiffusion3Pipeline",
            {
                "vae": autoencoder(1024, 16, scaling_factor=1.5305, shift_factor=0.0609, **NO_QUANT_CONV),
                "text_encoder": clip_text(768, 12, 12, act="quick_gelu", projection=True),
                "text_encoder_2": clip_text(1280, 32, 20, projection=True),
                "text_encoder_3": T5_XXL,
                "transformer": TRANSFORMER,
            },
            (EULER_FLOW, {"shift": 3.0}),
        ),
        shards={"text_encoder_3": 2},
        optional={"text_encoder_3": 9_520_000_000},
    ),
)
