"""How well an image shows what its prompt says, by the small dual encoder trained beside the embedded prior."""

from pathlib import Path

import torch
from torch import Tensor

from bench import Config, Reward
from bench.models import emoji
from bench.models.encoders import Clip


class EmojiClipConfig(Config):
    """folder: a CLIP model in transformers' own layout; None means the shipped one."""

    folder: Path | None = None


class EmojiClip(Reward):
    """100 × the cosine of CLIP's image and text embeddings."""

    Config = EmojiClipConfig
    config: EmojiClipConfig

    scale = "100 x cosine similarity, -100 to 100"
    source = "Radford et al. (2021), arXiv:2103.00020; weights of our own (bench.recipe.train)"

    def __init__(self, config: EmojiClipConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.clip = Clip(config.folder or emoji.path() / "clip", self.device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * self.clip.similarity(images, prompts)
