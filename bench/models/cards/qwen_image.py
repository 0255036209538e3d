"""Qwen-Image. The numbers of files and bytes were written down without the hub at hand."""

from bench.models.architecture import EULER_FLOW, Architecture, Network
from bench.models.card import HubCard

QWEN25_VL = Network(
    "Qwen2_5_VLForConditionalGeneration",
    {"text_config": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                     "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
     "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                       "out_hidden_size": 3584}},
    {"text_config": {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
                     "bos_token_id": 0, "eos_token_id": 1,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
     "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": 16}},
)  # fmt: skip
MEAN, STD = (0.2, -0.3, 0.1, 0.4), (1.5, 0.8, 2.0, 1.1)  # of the scaled-down latents
NETWORKS = {
    "vae": Network(
        "AutoencoderKLQwenImage",
        {},
        {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": MEAN,
         "latents_std": STD},
    ),
    "text_encoder": QWEN25_VL,
    "transformer": Network(
        "QwenImageTransformer2DModel",
        {"in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56)},
        {"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 12,
         "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4)},
    ),
}  # fmt: skip
SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
         "shift_terminal": 0.02}  # fmt: skip

CARDS = (
    HubCard(
        "qwen-image",
        "Qwen-Image (flow, Apache-2.0), 20 B, 1024 pixels unless model.size says more; not yet run here",
        "Apache-2.0",
        hub="Qwen/Qwen-Image",
        size=57_700_000_000,
        architecture=Architecture("QwenImagePipeline", NETWORKS, (EULER_FLOW, SHIFT)),
        shards={"transformer": 9, "text_encoder": 4},
    ),
)
