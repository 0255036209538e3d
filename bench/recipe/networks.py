"""The networks of the embedded prior, their tokenizer, and how they are written for diffusers and transformers."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from bench.models.emoji import FLOW, STYLES, shared
from bench.recipe.art import SIZE

MAX_TOKENS = 16
TEXT_WIDTH = 128
LATENT = (4, SIZE // 4, SIZE // 4)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def autoencoder() -> AutoencoderKL:
    """KL autoencoder from images in [-1, 1] to latents of a quarter of their side."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=8,
        sample_size=SIZE,
    )


def unet() -> UNet2DConditionModel:
    """Noise predictor. Attention stays out of the first blocks, which cost most and see the least structure."""
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(80, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def transformer() -> SD3Transformer2DModel:
    """Velocity predictor on patches of 2×2 latents: 16 tokens of picture beside the text's.

    Its text states are the text encoder's twice over: the pipeline expects two encoders, and one serves as both.
    """
    return SD3Transformer2DModel(
        sample_size=LATENT[1],
        patch_size=2,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT[1],
        qk_norm="rms_norm",
    )


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's schedule; the final alpha stays below one, so that every transition has a density."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
        timestep_spacing="leading",
    )


def _text_settings(tokenizer: CLIPTokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Text encoder of the pipeline, trained jointly with the UNet."""
    return CLIPTextModel(CLIPTextConfig(**_text_settings(tokenizer)))


def dual_encoder(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Reward network for alignment: image and text encoders of its own."""
    text = _text_settings(tokenizer) | {"num_hidden_layers": 2, "intermediate_size": 256}
    vision = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def style_classifier() -> ResNetForImageClassification:
    """Reward network for drawing style: images in [-1, 1] to logits over ``STYLES``."""
    names = dict(enumerate(STYLES))
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=names,
        label2id={style: i for i, style in names.items()},
    )
    return ResNetForImageClassification(config)


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's own format, learnt from ``captions`` and written into ``folder``."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # every byte is kept, alone and at a word's end, so that a prompt in any script has tokens
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids ``[B, MAX_TOKENS]``, padded with the end token as the pipeline pads."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids


def export(networks: Mapping[str, Any], tokenizer_folder: Path, concepts: list[dict], folder: Path) -> None:
    """Write the pipeline and both reward networks into ``folder`` as float16 safetensors.

    ``networks`` holds ``vae``, ``unet``, ``text_encoder``, ``clip`` and ``style``. The folder appears by rename.
    """
    partial = folder.with_name(folder.name + ".partial")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    networks = {name: network.half().eval() for name, network in networks.items()}
    parts = {name: networks[name] for name in ("vae", "unet", "text_encoder")}
    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(partial)
    networks["clip"].save_pretrained(partial / "clip")
    networks["style"].save_pretrained(partial / "style")
    pixels = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": SIZE}
    for name in ("clip", "style"):
        (partial / name / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
    for target in (partial / "clip", partial / "tokenizer"):
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (target / file).write_bytes((tokenizer_folder / file).read_bytes())
    (partial / "concepts.json").write_text(json.dumps(concepts, indent=1) + "\n", encoding="utf-8")
    replace_folder(partial, folder)


def export_flow(model: SD3Transformer2DModel, folder: Path) -> None:
    """Write the transformer of ``emoji_flow`` as float16 into ``folder``, with what `StableDiffusion3Pipeline` reads
    beside the parts that it shares with ``emoji``. The folder appears by rename."""
    partial = folder.with_name(folder.name + ".partial")
    pipeline = StableDiffusion3Pipeline(
        transformer=model.half().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **shared(FLOW),
    )
    pipeline.save_config(partial)  # model_index.json alone
    for name in ("transformer", "scheduler"):
        getattr(pipeline, name).save_pretrained(partial / name)
    replace_folder(partial, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put ``partial`` in the place of ``folder`` by two renames."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
