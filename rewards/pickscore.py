"""PickScore: a CLIP model trained on human choices between two images."""

import torch
from torch import Tensor

from bench import Config, Reward
from bench.hub import CLIP_FILES, CLIP_TOKENIZER, Repository
from bench.models.encoders import Clip

WEIGHTS = Repository("yuvalkirstain/PickScore_v1", CLIP_FILES, size=3_945_000_000, also=CLIP_TOKENIZER)


class PickScore(Reward):
    """The cosine of image and text embeddings times the model's own temperature (about 100)."""

    scale = "temperature x cosine similarity, usually 17 to 24"
    source = "Kirstain et al. (2023), arXiv:2305.01569; yuvalkirstain/PickScore_v1"
    suite = "sd15-hps"
    files = (WEIGHTS,)

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.clip = Clip(WEIGHTS.path(), self.device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.model.logit_scale.exp() * self.clip.similarity(images, prompts)
