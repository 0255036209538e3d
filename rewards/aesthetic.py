"""The LAION aesthetic predictor: how much people like an image, whatever the prompt."""

from pathlib import Path

import torch
from torch import Tensor

from bench import Config, Reward
from bench.hub import CLIP_L, Repository
from bench.models.encoders import Clip, linear_head

HEAD = Repository("trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",), size=3_714_759)


class AestheticConfig(Config):
    """head: state dict of another head ("layers.0.weight", …); None means the hub's copy of LAION's."""

    head: Path | None = None


class Aesthetic(Reward):
    """A linear head (768-1024-128-64-16-1) on the unit image embedding of CLIP ViT-L/14; prompts play no part."""

    Config = AestheticConfig
    config: AestheticConfig

    scale = "rating, about 1 to 10, usually 4 to 7"
    source = "Schuhmann (2022), christophschuhmann/improved-aesthetic-predictor, as used by Black et al. (2023)"
    suite = "sd15-aesthetic"
    files = (CLIP_L, HEAD)

    def __init__(self, config: AestheticConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        file = config.head or HEAD.path(HEAD.files[0])
        self.head = linear_head(torch.load(file, map_location="cpu", weights_only=True)).to(self.device)
        self.clip = Clip(CLIP_L.path(), self.device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(torch.nn.functional.normalize(self.clip.images(images), dim=1)).squeeze(1)
