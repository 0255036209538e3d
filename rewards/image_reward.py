"""ImageReward: BLIP with a head trained on human rankings of images of one prompt."""

import json
import re

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from bench import Config, Reward
from bench.hub import Repository
from bench.models.encoders import OPENAI_MEAN, OPENAI_STD, cover, linear_head

WEIGHTS = Repository("THUDM/ImageReward", ("ImageReward.pt", "med_config.json"), size=1_790_000_000)
TOKENIZER = Repository("google-bert/bert-base-uncased", ("vocab.txt",), size=231_508, also=("tokenizer_config.json",))
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, in the official code
LENGTH = 35  # tokens

# BLIP's own names of the image encoder's weights → transformers'
VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageReward(Reward):
    """The head's score of BLIP's text encoder, which attends to the image, standardised as in the official code."""

    scale = "standardised, usually -2 to 2"
    source = "Xu et al. (2023), arXiv:2304.05977; THUDM/ImageReward"
    suite = "sd15-imagereward"
    files = (WEIGHTS, TOKENIZER)

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        state = torch.load(WEIGHTS.path("ImageReward.pt"), map_location="cpu", weights_only=True, mmap=True)
        self.head = linear_head(_part(state, "mlp.")).to(self.device)
        self.vision = _vision(_part(state, "blip.visual_encoder.")).to(self.device)
        width = self.vision.config.hidden_size
        settings = json.loads(WEIGHTS.path("med_config.json").read_text(encoding="utf8"))
        text = BlipTextConfig(**settings | {"encoder_hidden_size": width, "is_decoder": True})  # is_decoder: attends
        self.text = _load(BlipTextModel(text, add_pooling_layer=False), _part(state, "blip.text_encoder."))
        self.text.to(self.device)
        self.tokenizer = BertTokenizerFast.from_pretrained(TOKENIZER.path(), local_files_only=True)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = functional.normalize(cover(images, self.vision.config.image_size), OPENAI_MEAN, OPENAI_STD)
        seen = self.vision(pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        )
        return (self.head(read.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _vision(state: dict[str, Tensor]) -> BlipVisionModel:
    """The image encoder; its sizes are read off the weights (heads of 64, as in every ViT of BLIP)."""
    patch, width = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,
    )
    for old, new in VISION:
        state = {re.sub(old, new, name): tensor for name, tensor in state.items()}
    return _load(BlipVisionModel(config), state)


def _load(model: torch.nn.Module, state: dict[str, Tensor]) -> torch.nn.Module:
    """Strictly, but for the table of positions that old checkpoints store."""
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")})
    return model.float().eval().requires_grad_(False)
