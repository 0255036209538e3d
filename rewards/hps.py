"""HPSv2.1: a CLIP model trained on human preferences between images of one prompt."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from bench import Config, Reward
from bench.hub import Repository
from bench.models.encoders import OPENAI_MEAN, OPENAI_STD, contain

WEIGHTS = Repository("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), size=1_972_298_538)


class HPS(Reward):
    """The cosine of image and text embeddings of OpenCLIP ViT-H/14 with the HPSv2.1 weights."""

    scale = "cosine similarity, usually 0.20 to 0.35"
    source = "Wu et al. (2023), arXiv:2306.09341; xswu/HPSv2, version 2.1"
    suite = "sd15-hps"
    files = (WEIGHTS,)

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        import open_clip  # takes seconds, and a run must say sooner what is missing

        super().__init__(config, device)
        file = WEIGHTS.path(WEIGHTS.files[0])
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        with torch.random.fork_rng(devices=[]):  # its initial weights are drawn and thrown away
            model = open_clip.CLIP(**_sizes(state))
        model.load_state_dict(state)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer("ViT-H-14")
        self._texts: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = functional.normalize(contain(images, self.model.visual.image_size[0]), OPENAI_MEAN, OPENAI_STD)
        text = torch.stack([self._text(prompt) for prompt in prompts])
        return (self.model.encode_image(pixels, normalize=True) * text).sum(1)

    @torch.no_grad()
    def _text(self, prompt: str) -> Tensor:
        """Unit embedding [d], computed alone and once."""
        if prompt not in self._texts:
            tokens = self.tokenizer([prompt]).to(self.device)
            self._texts[prompt] = self.model.encode_text(tokens, normalize=True)[0]
        return self._texts[prompt]


def _sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """open_clip's description of the network, read off its weights; the heads are ViT-H/14's: 80 wide, 64 for text."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    length, text_width = state["positional_embedding"].shape
    side = patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)

    def layers(prefix: str) -> int:
        return len({name.split(".resblocks.")[1].split(".")[0] for name in state if name.startswith(prefix)})

    return {
        "embed_dim": state["visual.proj"].shape[1],
        "vision_cfg": {
            "image_size": side,
            "layers": layers("visual.transformer."),
            "width": width,
            "head_width": 80,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": length,
            "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width,
            "heads": text_width // 64,
            "layers": layers("transformer."),
        },
    }
