"""Z-Image and Z-Image-Turbo. The numbers of files and bytes were written down without the hub at hand."""

from bench.models.architecture import EULER_FLOW, NO_QUANT_CONV, Architecture, Network, autoencoder
from bench.models.card import HubCard
from bench.models.cards.flux import QWEN3

NETWORKS = {
    "vae": autoencoder(1024, 16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT_CONV),
    "text_encoder": Network("Qwen3Model", QWEN3.full, QWEN3.tiny | {"num_hidden_layers": 2}),
    "transformer": Network(
        "ZImageTransformer2DModel",
        {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
         "cap_feat_dim": 2560, "axes_dims": (32, 48, 48), "axes_lens": (1536, 512, 512)},
        {"in_channels": 4, "dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 8, "axes_dims": (4, 4, 4), "axes_lens": (1536, 512, 512)},
    ),
}  # fmt: skip


def _card(name: str, text: str, hub: str, shift: float) -> HubCard:
    return HubCard(
        name,
        text,
        "Apache-2.0",
        hub=f"Tongyi-MAI/{hub}",
        size=32_900_000_000,
        architecture=Architecture("ZImagePipeline", NETWORKS, (EULER_FLOW, {"shift": shift})),
        shards={"transformer": 3, "text_encoder": 3},
    )


CARDS = (
    _card("z-image", "Z-Image (flow), 1024 pixels; not yet run here", "Z-Image", 6.0),
    _card(
        "z-image-turbo",
        "Z-Image-Turbo (flow, distilled to 8 steps), 1024 pixels; not yet run here",
        "Z-Image-Turbo",
        3.0,
    ),
)
