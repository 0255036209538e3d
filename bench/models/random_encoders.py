"""Random weights of the networks behind rewards and feature spaces, in the layout of their repositories."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
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
QWEN2_VL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # text, vision
    "full": ({"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
              "intermediate_size": 18944, "max_position_embeddings": 32768,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
             {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 3584}),
    "tiny": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 32, "max_position_embeddings": 32768,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
             {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "hidden_size": 32}),
}  # fmt: skip
QWEN3_VL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128, "intermediate_size": 12288, "max_position_embeddings": 262144,
              "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                  "mrope_interleaved": True}},
             {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16,
              "out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}),
    "tiny": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 32768,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
                                  "mrope_interleaved": True}},
             {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 16,
              "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
}  # fmt: skip
QWEN_WORDS = (
    *map(chr, range(33, 127)), "Ġ", "Ċ", "Yes", "yes", "ĠYes", "Ġyes",
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
)  # fmt: skip
QWEN_CHAT = (  # as far as one message with an image goes; Qwen2-VL puts a system message before it
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP_LETTERS = 512  # tokens of one byte, within a word and at its end
HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # layer number → outputs


def clip(architecture: Literal["clip-l", "clip-h"]) -> Callable[[Path, Size], None]:
    """A writer of a CLIP repository in transformers' layout."""

    def write_clip(folder: Path, size: Size) -> None:
        text, vision, dimension = CLIP[architecture if size == "full" else "tiny"]
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension)
        alive(CLIPModel(config)).save_pretrained(folder)
        clip_tokenizer(folder, size)
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


def qwen2_vl_reader(folder: Path, size: Size) -> None:
    """What reads images and texts for Qwen2-VL, without its weights."""
    _qwen_reader(folder, _qwen2_vl(size, _qwen_tokenizer(folder)), patch=14, mean=OPENAI_MEAN, std=OPENAI_STD)


def hpsv3(folder: Path, size: Size) -> None:
    """Qwen2-VL with a token and a head of its own, under the names that transformers 4.45 gave."""
    tokenizer = _qwen_tokenizer(folder)
    config = _qwen2_vl(size, tokenizer)
    config.text_config.vocab_size = len(tokenizer) + 1
    model = alive(Qwen2VLForConditionalGeneration(config).to(torch.bfloat16 if size == "full" else torch.float32))
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    state = {
        next((old + name.removeprefix(new) for new, old in names.items() if name.startswith(new)), name): tensor
        for name, tensor in model.state_dict().items()
    }
    inputs = config.text_config.hidden_size
    for number, outputs in {0: 1024, 3: 16, 5: 2}.items():
        layer = alive(nn.Linear(inputs, outputs))
        state |= {f"rm_head.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        inputs = outputs
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "HPSv3.safetensors")
    for file in folder.glob("*.json"):  # the tokenizer's, which lie in Qwen2-VL's repository
        file.unlink()


def qwen3_vl(folder: Path, size: Size) -> None:
    """Qwen3-VL-8B in transformers' layout, in four files."""
    tokenizer = _qwen_tokenizer(folder)
    text, vision = QWEN3_VL[size]
    config = Qwen3VLConfig(
        text_config=text | {"vocab_size": 151936 if size == "full" else len(tokenizer)},
        vision_config=vision,
        tie_word_embeddings=False,
        **_qwen_tokens(tokenizer),
    )
    model = alive(Qwen3VLForConditionalGeneration(config).to(torch.bfloat16 if size == "full" else torch.float32))
    state, files = model.state_dict(), [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]
    places = {name: files[place % 4] for place, name in enumerate(sorted(state))}
    for file in files:
        part = {name: state[name].contiguous() for name, there in places.items() if there == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf8")
    _qwen_reader(folder, config, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def _qwen2_vl(size: Size, tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    text, vision = QWEN2_VL[size]
    vocabulary = {"vocab_size": 152064 if size == "full" else len(tokenizer)}
    return Qwen2VLConfig(
        text_config=text | vocabulary, vision_config=vision, tie_word_embeddings=False, **_qwen_tokens(tokenizer)
    )


def _qwen_tokens(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    marks = {"image": "<|image_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    found = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    return found | {"video_token_id": len(tokenizer) + 7}  # which no text holds


def _qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Printable letters and a few words, of Qwen's kind."""
    words = {word: i for i, word in enumerate(QWEN_WORDS)}
    merges = [("Y", "e"), ("Ye", "s"), ("y", "e"), ("ye", "s"), ("Ġ", "Yes"), ("Ġ", "yes")]
    words |= {word: len(words) + i for i, word in enumerate(("Ye", "ye"))}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=merges, additional_special_tokens=list(QWEN_WORDS[-6:]))
    tokenizer.save_pretrained(folder)
    return tokenizer


def _qwen_reader(folder: Path, config: Any, patch: int, mean: Sequence[float], std: Sequence[float]) -> None:
    config.save_pretrained(folder)
    _qwen_tokenizer(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_CHAT}), encoding="utf8")
    settings = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "image_mean": mean, "image_std": std,
                "min_pixels": 3136, "max_pixels": 12845056}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf8")


WRITERS: dict[str, Callable[[Path, Size], None]] = {
    "openai/clip-vit-large-patch14": clip("clip-l"),
    "yuvalkirstain/PickScore_v1": clip("clip-h"),
    "trl-lib/ddpo-aesthetic-predictor": aesthetic,
    "xswu/HPSv2": hps,
    "THUDM/ImageReward": image_reward,
    "google-bert/bert-base-uncased": bert_vocabulary,
    "MizzenAI/HPSv3": hpsv3,
    "Qwen/Qwen2-VL-7B-Instruct": qwen2_vl_reader,
    "Qwen/Qwen3-VL-8B-Instruct": qwen3_vl,
}


def clip_tokenizer(folder: Path, size: Size) -> CLIPTokenizer:
    """CLIP's own vocabulary, which the package open_clip carries; a tiny one has the letters, with their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds; a dry run asks this module for shapes alone

    words = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): i for word, i in words.encoder.items()}
    merges = [" ".join(pair) for pair, _ in sorted(words.bpe_ranks.items(), key=lambda item: item[1])]
    if size == "tiny":  # the whole takes half a second to read
        vocabulary = {word: i for word, i in vocabulary.items() if i < CLIP_LETTERS or word in special.values()}
        merges = []
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf8")
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
