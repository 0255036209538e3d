"""HPSv2.1: a CLIP model trained on human preferences between images of one prompt."""

import open_clip
import torch
from torch import Tensor

from bench import Config, Reward
from bench.errors import BenchError
from bench.hub import Repository
from bench.towers import contain, normalise

WEIGHTS = Repository("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), size=1_972_298_538)


class HPS(Reward):
    """The cosine of image and text embeddings of OpenCLIP ViT-H/14 with the HPSv2.1 weights."""

    class Config(Config):
        """architecture: the name that open_clip gives to the network of the checkpoint."""

        architecture: str = "ViT-H-14"

    scale = "cosine similarity, usually 0.20 to 0.35"
    source = "Wu et al. (2023), arXiv:2306.09341; xswu/HPSv2, version 2.1"
    suite = "sd15-hps"
    files = (WEIGHTS,)

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        state = torch.load(WEIGHTS.path(WEIGHTS.files[0]), map_location="cpu", weights_only=True, mmap=True)
        sizes = open_clip.get_model_config(config.architecture)
        if sizes is None:
            raise BenchError(f"open_clip knows no architecture {config.architecture!r}: see open_clip.list_models().")
        with torch.random.fork_rng(devices=[]):  # its initial weights are drawn and thrown away
            model = open_clip.CLIP(**sizes)
        model.load_state_dict(state["state_dict"])
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(config.architecture)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalise(contain(images, self.model.visual.image_size[0]))
        text = torch.stack([self._text(prompt) for prompt in prompts])
        return (self.model.encode_image(pixels, normalize=True) * text).sum(1)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """Unit embedding [d], computed alone and once."""
        if prompt not in self._texts:
            tokens = self.tokenizer([prompt]).to(self.device)
            self._texts[prompt] = self.model.encode_text(tokens, normalize=True)[0]
        return self._texts[prompt]
