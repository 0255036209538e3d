"""How well an image shows what its prompt says, by OpenAI's CLIP."""

import torch
from torch import Tensor

from bench import Config, Reward
from bench.hub import CLIP_L
from bench.models.encoders import Clip


class ClipScore(Reward):
    """100 × the cosine of the image and text embeddings of CLIP ViT-L/14."""

    scale = "100 x cosine similarity, usually 15 to 35"
    source = "Hessel et al. (2021), arXiv:2104.08718; openai/clip-vit-large-patch14"
    suite = "sd15-hps"
    files = (CLIP_L,)

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.clip = Clip(CLIP_L.path(), self.device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * self.clip.similarity(images, prompts)
