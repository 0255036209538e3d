"""How surely an image is drawn in one of the three styles of the embedded prior."""

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers import ResNetForImageClassification

from bench import Config, Reward
from bench.models import emoji


class EmojiStyleConfig(Config):
    """style: the one to ask for. folder: a classifier in transformers' layout; None means the shipped one."""

    style: Literal["noto", "twemoji", "fluent"] = "fluent"
    folder: Path | None = None


class EmojiStyle(Reward):
    """Log-probability of a style under a small residual classifier; prompts play no part."""

    Config = EmojiStyleConfig
    config: EmojiStyleConfig
    scale = "log-probability in nats, at most 0"
    source = "He et al. (2016), arXiv:1512.03385; weights of our own (bench.recipe.train)"

    def __init__(self, config: EmojiStyleConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        folder = config.folder or emoji.path() / "style"
        self.pixels = json.loads((folder / "preprocessor_config.json").read_text())
        model = ResNetForImageClassification.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.model = model.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        side = self.pixels["size"]
        resized = functional.resize(images, [side, side], antialias=True)
        pixels = functional.normalize(resized, self.pixels["image_mean"], self.pixels["image_std"])
        logits = self.model(pixels).logits
        return logits.log_softmax(1)[:, self.model.config.label2id[self.config.style]]
