"""How well an image shows what its prompt says, by the small dual encoder trained beside the embedded prior."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers import CLIPModel, CLIPTokenizer

from bench import Config, Reward
from bench.models import emoji


class EmojiClip(Reward):
    """100 × the cosine of CLIP's image and text embeddings."""

    class Config(Config):
        """folder: a CLIP model in transformers' own layout; None means the shipped one."""

        folder: Path | None = None

    scale = "100 x cosine similarity, -100 to 100"
    source = "Radford et al. (2021), arXiv:2103.00020; weights of our own (bench.models.emoji.train)"

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        folder = config.folder or emoji.path() / "clip"
        pixels = json.loads((folder / "preprocessor_config.json").read_text())
        self.mean, self.std = pixels["image_mean"], pixels["image_std"]
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        side = self.model.config.vision_config.image_size
        pixels = functional.normalize(functional.resize(images, [side, side], antialias=True), self.mean, self.std)
        image = self.model.get_image_features(pixels).pooler_output
        text = torch.stack([self._text(prompt) for prompt in prompts])
        return 100 * torch.cosine_similarity(image, text)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """Embedding [d], computed alone: its bits must not depend on which prompts happened to come together."""
        if prompt not in self._texts:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            self._texts[prompt] = self.model.get_text_features(tokens.input_ids.to(self.device)).pooler_output[0]
        return self._texts[prompt]
