"""Wan 2.1, text to video. The numbers of files and bytes were written down without the hub at hand."""

from bench.models.architecture import SOLVER, Architecture, Network
from bench.models.card import HubCard
from bench.models.cards.qwen_image import MEAN, STD

UMT5_XXL = Network(
    "UMT5EncoderModel",
    {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
     "feed_forward_proj": "gated-gelu"},
    {"vocab_size": 128, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
)  # fmt: skip
AUTOENCODER = Network(
    "AutoencoderKLWan",
    {},
    {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": MEAN,
     "latents_std": STD},
)  # fmt: skip
TINY = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12,
        "ffn_dim": 16, "freq_dim": 16, "text_dim": 16, "cross_attn_norm": True}  # fmt: skip


def _card(size: str, heads: int, layers: int, inner: int, data: int, shards: int) -> HubCard:
    """inner: width of the feed-forward network. data: bytes of the files, about. shards: of the denoiser."""
    full = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": inner}
    networks = {
        "vae": AUTOENCODER,
        "text_encoder": UMT5_XXL,
        "transformer": Network("WanTransformer3DModel", full, TINY),
    }
    return HubCard(
        f"wan2.1-t2v-{size}",
        f"Wan 2.1 {size.upper()} (flow), 480×832 pixels, one frame unless model.frames says more; not yet run here",
        "Apache-2.0",
        hub=f"Wan-AI/Wan2.1-T2V-{size.upper()}-Diffusers",
        size=data,
        architecture=Architecture("WanPipeline", networks, ("UniPCMultistepScheduler", SOLVER)),
        shards={"text_encoder": 5, "transformer": shards},
    )


CARDS = (
    _card("1.3b", 12, 30, 8960, 28_900_000_000, 2),
    _card("14b", 40, 40, 13824, 80_500_000_000, 12),
)
