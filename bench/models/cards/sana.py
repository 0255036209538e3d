"""Sana 1.0, of 600 and 1600 million parameters. Files and bytes are those that diffusers' conversion writes."""

from bench.models.architecture import SOLVER, Architecture, Network
from bench.models.card import HubCard

GEMMA2 = Network(
    "Gemma2Model",
    {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
     "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
     "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
)  # fmt: skip
BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
AUTOENCODER = Network(
    "AutoencoderDC",
    {"latent_channels": 32, "encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS,
     "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "downsample_block_type": "Conv",
     "upsample_block_type": "interpolate", "scaling_factor": 0.41407},
    {"latent_channels": 4, "encoder_block_types": BLOCKS[2:4], "decoder_block_types": BLOCKS[2:4],
     "encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16), "attention_head_dim": 8,
     "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)),
     "decoder_qkv_multiscales": ((), (5,)), "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
     "scaling_factor": 0.41407},
)  # fmt: skip
TINY = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 16, "sample_size": 16}  # fmt: skip


def _card(millions: int, heads: int, layers: int, cross: tuple[int, int], size: int, shards: int) -> HubCard:
    """cross: heads of the attention to the text, and the width of each. size: bytes. shards: of the denoiser."""
    width = 32 * heads
    full = {"num_attention_heads": heads, "num_layers": layers, "num_cross_attention_heads": cross[0],
            "cross_attention_head_dim": cross[1], "cross_attention_dim": width}  # fmt: skip
    networks = {
        "vae": AUTOENCODER,
        "text_encoder": GEMMA2,
        "transformer": Network("SanaTransformer2DModel", full, TINY),
    }
    return HubCard(
        f"sana-{millions}m",
        f"Sana {millions}M (flow), 1024 pixels; not yet run here",
        "of the repository, and Gemma's for the text encoder: read both",
        hub=f"Efficient-Large-Model/Sana_{millions}M_1024px_diffusers",
        size=size,
        architecture=Architecture("SanaPipeline", networks, ("DPMSolverMultistepScheduler", SOLVER)),
        shards={"text_encoder": 2, "transformer": shards},
    )


CARDS = (
    _card(600, 36, 28, (16, 72), size=8_900_000_000, shards=1),
    _card(1600, 70, 20, (20, 112), size=12_900_000_000, shards=2),
)
