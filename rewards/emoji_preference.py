"""A preference reward: what a small model learned from pairs of the embedded priors' pictures, labelled by a judge."""

from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import Config, Reward
from bench.models import emoji
from bench.models.encoders import Clip


class EmojiPreferenceConfig(Config):
    """pairs: how many labels it learned from; fewer can be exploited sooner."""

    pairs: Literal[200, 2000] = 2000


class EmojiPreference(Reward):
    """Log-odds of a Bradley–Terry model: `r(a) − r(b)` is that of the judge's preferring picture a to b.

    A linear head on what the encoder of `emoji_clip` sees. The judge is `emoji_gold`: where this rises and that
    falls, a method exploits the model's errors.
    """

    Config = EmojiPreferenceConfig
    config: EmojiPreferenceConfig
    scale = "log-odds, about -0.5 to 1 on the priors' pictures"
    source = "Bradley and Terry (1952), doi:10.1093/biomet/39.3-4.324; weights of our own (bench.recipe.preference)"

    def __init__(self, config: EmojiPreferenceConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.clip = Clip(emoji.path() / "clip", self.device)
        state = load_file(emoji.PREFERENCE / f"{config.pairs}.safetensors")
        self.head = nn.Linear(state["weight"].shape[1], 1)
        self.head.load_state_dict(state)
        self.head.to(self.device).requires_grad_(False)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.states(images, prompts)).squeeze(1)
