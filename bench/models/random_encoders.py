"""Random weights of the networks behind rewards and feature spaces, in the layout of their repositories."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from bench.models.architecture import Size
from bench.models.encoders import OPENAI_MEAN, OPENAI_STD

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
          "hidden_act": "gelu"}  # fmt: skip
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "hidden_act": "gelu"}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # text encoder, image encoder, joint dimension
    "clip-l": (CLIP_L, {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                              "num_attention_heads": 16, "patch_size": 14, "image_size": 224}, 768),
    "clip-h": (CLIP_H | {"num_hidden_layers": 24}, {"hidden_size": 1280, "intermediate_size": 5120,
               "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14, "image_size": 224,
               "hidden_act": "gelu"}, 1024),
    "tiny": (TINY, TINY | {"patch_size": 16, "image_size": 32}, 16),
}  # fmt: skip
TINY_VIT_H = {  # of the checkpoint of the hps reward, by open_clip's names
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 80, "head_width": 80, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
BLIP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # image encoder, text encoder
    "full": ({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 16, "image_size": 224},
             {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "tiny": ({"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
              "patch_size": 16, "image_size": 32},
             {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
}  # fmt: skip
HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # layer number → outputs


def clip(architecture: Literal["clip-l", "clip-h"]) -> Callable[[Path, Size], None]:
    """A writer of a CLIP repository in transformers' layout."""

    def write_clip(folder: Path, size: Size) -> None:
        text, vision, dimension = CLIP[architecture if size == "full" else "tiny"]
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)
        alive(CLIPModel(config)).save_pretrained(folder)
        clip_tokenizer(folder)
        settings = {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "size": {"shortest_edge": vision["image_size"]}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf8")

    return write_clip


def hps(folder: Path, size: Size) -> None:
    """OpenCLIP's ViT-H-14 as `{"state_dict": …}`."""
    import open_clip

    model = open_clip.CLIP(**(open_clip.get_model_config("ViT-H-14") if size == "full" else TINY_VIT_H))
    torch.save({"state_dict": alive(model).state_dict()}, folder / "HPS_v2.1_compressed.pt")


def image_reward(folder: Path, size: Size) -> None:
    """BLIP and the head under the names of the official code."""
    vision, text = BLIP[size]
    encoder = alive(BlipVisionModel(BlipVisionConfig(**vision)))
    text_config = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"])
    reader = alive(BlipTextModel(text_config, add_pooling_layer=False))
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "post_layernorm": "norm",
        "layer_norm": "norm",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
    }
    state = {}
    for name, tensor in encoder.state_dict().items():
        for ours, official in names.items():
            name = name.replace(ours, official)
        state[f"blip.visual_encoder.{name}"] = tensor
    state |= {f"blip.text_encoder.{name}": tensor for name, tensor in reader.state_dict().items()}
    positions = torch.arange(text_config.max_position_embeddings)
    state["blip.text_encoder.embeddings.position_ids"] = positions.expand(1, -1)
    state |= {f"mlp.{name}": tensor for name, tensor in _head(text["hidden_size"]).items()}
    torch.save(state, folder / "ImageReward.pt")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
            "max_position_embeddings", "layer_norm_eps", "hidden_act", "hidden_dropout_prob")  # fmt: skip
    med = {key: getattr(text_config, key) for key in keys}
    (folder / "med_config.json").write_text(json.dumps(med | {"encoder_width": vision["hidden_size"]}), encoding="utf8")


def aesthetic(folder: Path, size: Size) -> None:
    """The head of the aesthetic predictor."""
    torch.save(_head(768 if size == "full" else CLIP["tiny"][2]), folder / "aesthetic-model.pth")


def bert_vocabulary(folder: Path, size: Size) -> None:
    """Letters, digits and BERT's special words; the rest of 30,522 lines is unused."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(33, 127)),
        *(f"##{chr(i)}" for i in range(33, 127)),
    ]
    words += [f"[unused{i}]" for i in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf8")


WRITERS: dict[str, Callable[[Path, Size], None]] = {
    "openai/clip-vit-large-patch14": clip("clip-l"),
    "yuvalkirstain/PickScore_v1": clip("clip-h"),
    "trl-lib/ddpo-aesthetic-predictor": aesthetic,
    "xswu/HPSv2": hps,
    "THUDM/ImageReward": image_reward,
    "google-bert/bert-base-uncased": bert_vocabulary,
}


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own vocabulary, which the package open_clip carries."""
    folder.mkdir(parents=True, exist_ok=True)
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds; a dry run asks this module for shapes alone

    words = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): i for word, i in words.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf8")
    merges = [" ".join(pair) for pair, _ in sorted(words.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}), encoding="utf8")
    return tokenizer


def alive(model: Any) -> Any:
    """Weights of variance 1/fan_in: initial ones are so small that the output would hardly depend on the input."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
    return model


def _head(inputs: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number, outputs in HEAD.items():
        layer = nn.Linear(inputs, outputs)
        state |= {f"layers.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        inputs = outputs
    return state
