"""Stable Diffusion XL."""

from bench.models.architecture import CLIP_L, NOISE, Architecture, Network, autoencoder, clip_text
from bench.models.card import HubCard

UNET = Network(
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
)  # fmt: skip

CARDS = (
    HubCard(
        "sdxl",
        "Stable Diffusion XL 1.0, 1024 pixels; not yet run here",
        "CreativeML Open RAIL++-M",
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        size=13_900_000_000,
        architecture=Architecture(
            "StableDiffusionXLPipeline",
            {
                "vae": autoencoder(1024, scaling_factor=0.13025, force_upcast=True),
                "text_encoder": CLIP_L,
                "text_encoder_2": clip_text(1280, 32, 20, projection=True),
                "unet": UNET,
            },
            ("EulerDiscreteScheduler", NOISE | {"timestep_spacing": "leading", "set_alpha_to_one": False}),
            dtype="float32",
        ),
    ),
)
