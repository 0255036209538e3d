"""FLUX.1 schnell and dev, and FLUX.2 klein."""

from bench.few_step import FewStep
from bench.models.architecture import (
    CLIP_L,
    EULER_FLOW,
    NO_QUANT_CONV,
    T5_XXL,
    Architecture,
    Network,
    autoencoder,
)
from bench.models.card import HubCard


def _flux1(guidance: bool) -> Architecture:
    """guidance: as an input of the network, with a shift that grows with the picture (dev)."""
    tiny = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
            "num_attention_heads": 2, "joint_attention_dim": 40, "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 4)}  # fmt: skip
    both = {"guidance_embeds": guidance}
    networks = {
        "vae": autoencoder(1024, 16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT_CONV),
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
        "transformer": Network("FluxTransformer2DModel", both, both | tiny),
    }
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return Architecture("FluxPipeline", networks, (EULER_FLOW, shift))


QWEN3 = Network(
    "Qwen3ForCausalLM",
    {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    {"vocab_size": 128, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 27,
     "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True},
)  # fmt: skip
FLUX2_TRANSFORMER = Network(
    "Flux2Transformer2DModel",
    {"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
     "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
     "guidance_embeds": False},
    {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
     "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4),
     "timestep_guidance_channels": 16, "guidance_embeds": False},
)  # fmt: skip

CARDS = (
    HubCard(
        "flux_schnell",
        "FLUX.1 schnell (flow, Apache-2.0), 1024 pixels; not yet run here",
        "Apache-2.0",
        hub="black-forest-labs/FLUX.1-schnell",
        size=33_700_000_000,
        architecture=_flux1(guidance=False),
        shards={"transformer": 3, "text_encoder_2": 2},
        few_step=FewStep(steps=(1, 2, 3, 4)),
    ),
    HubCard(
        "flux_dev",
        "FLUX.1 dev (flow, non-commercial), 1024 pixels; gated; not yet run here",
        "FLUX.1 [dev] Non-Commercial License",
        hub="black-forest-labs/FLUX.1-dev",
        size=33_700_000_000,
        architecture=_flux1(guidance=True),
        shards={"transformer": 3, "text_encoder_2": 2},
    ),
    HubCard(
        "flux2_klein",
        "FLUX.2 klein base 4B (flow, Apache-2.0), 1024 pixels; not yet run here",
        "Apache-2.0",
        hub="black-forest-labs/FLUX.2-klein-base-4B",
        size=16_000_000_000,
        architecture=Architecture(
            "Flux2KleinPipeline",
            {
                "vae": autoencoder(1024, 32, "AutoencoderKLFlux2"),
                "text_encoder": QWEN3,
                "transformer": FLUX2_TRANSFORMER,
            },
            (EULER_FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
        ),
        shards={"text_encoder": 2},
    ),
)
