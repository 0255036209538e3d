"""Pretrained image and text encoders that several rewards and feature spaces share, differentiable in the image.

Official pipelines resize 8-bit images with PIL. Here torchvision's bicubic, antialiased resize, which is PIL's, runs on
float tensors, so that gradients flow and nothing is rounded to 8 bits in between.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode, functional

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the pixel statistics of CLIP, which BLIP and HPS use too
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, size: list[int]) -> Tensor:
    """Images [B, 3, H, W] resized to `size`, of one side for the shorter one; overshoot is cut off, as 8 bits would."""
    return functional.resize(images, size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def cover(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] with the shorter side resized to `side` and the middle square cut out."""
    resized = resize(images, [side])
    # transformers rounds the corner down; torchvision's center_crop rounds it to the nearest
    top, left = (resized.shape[-2] - side) // 2, (resized.shape[-1] - side) // 2
    return functional.crop(resized, top, left, side, side)


def contain(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] with the longer side resized to `side`, padded with black to a square."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)  # open_clip rounds the shorter side; torchvision's max_size rounds it down
    inner = resize(images, [round(height * scale), round(width * scale)])
    left, top = (side - inner.shape[-1]) // 2, (side - inner.shape[-2]) // 2
    return functional.pad(inner, [left, top, side - inner.shape[-1] - left, side - inner.shape[-2] - top])


class Clip:
    """A CLIP model in transformers' own layout: embeddings of images and of prompts, not normalised, float32.

    Its pixel statistics are read from `preprocessor_config.json`.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        from transformers import CLIPModel, CLIPTokenizer

        pixels = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf8"))
        self.mean, self.std = pixels["image_mean"], pixels["image_std"]
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, use_safetensors=True)
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        self._texts: dict[str, Tensor] = {}

    def pixels(self, images: Tensor) -> Tensor:
        """What the image encoder sees of images [B, 3, H, W] in [0, 1]."""
        return functional.normalize(cover(images, self.model.config.vision_config.image_size), self.mean, self.std)

    def images(self, images: Tensor) -> Tensor:
        """Embeddings [B, d] of images [B, 3, H, W] in [0, 1]."""
        return self.model.get_image_features(self.pixels(images)).pooler_output

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """Embeddings [B, d]; each prompt alone and once: its bits must not depend on its neighbours."""
        length = self.model.config.text_config.max_position_embeddings
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._texts:
                tokens = self.tokenizer(
                    prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                self._texts[prompt] = self.model.get_text_features(tokens.input_ids.to(self.device)).pooler_output[0]
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def states(self, images: Tensor, prompts: list[str]) -> Tensor:
        """All that a head can build on, [B, d], of images [B, 3, H, W] and prompts.

        The mean token of every layer of the image encoder, the unit embeddings of image and prompt, and their product.
        """
        vision = self.model.vision_model(self.pixels(images), output_hidden_states=True)
        tokens = [layer.mean(1) for layer in vision.hidden_states]
        image = torch.nn.functional.normalize(self.model.visual_projection(vision.pooler_output), dim=1)
        text = torch.nn.functional.normalize(self.texts(prompts), dim=1)
        return torch.cat([*tokens, image, text, image * text], 1)

    def similarity(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosines [B] of image i and prompt i."""
        return torch.cosine_similarity(self.images(images), self.texts(prompts))


def linear_head(state: dict[str, Tensor]) -> nn.Sequential:
    """The head of the aesthetic and ImageReward scores: linear layers without activations, sizes as in the weights.

    state: "layers.0.weight", "layers.0.bias", … in order; the gaps in the numbers are dropout, idle at evaluation.
    """
    names = sorted((name for name in state if name.endswith("weight")), key=lambda name: int(name.split(".")[1]))
    layers = []
    for name in names:
        weight, bias = state[name].float(), state[name.replace("weight", "bias")].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False)
