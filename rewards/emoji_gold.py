"""The judge that no training sees: how near a picture of the embedded priors is to real art of what its prompt says."""

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench import Config, Reward
from bench.errors import BenchError
from bench.evaluation.features import EfficientNetLite0
from bench.models import emoji


class EmojiGold(Reward):
    """Minus the squared distance to the real art of the prompted concept, in units of that of fresh real art.

    Distances are those of a linear discriminant of the concepts (ImageNet features of EfficientNet-Lite0, shrunk
    covariance within concepts). It labels the pairs that `emoji_preference` learns from. To measure with, not to train
    on: `--set 'evaluation.rewards=[emoji_gold]'`. Raises BenchError for a prompt that names none of the concepts.
    """

    differentiable = False
    scale = "-1 for real art of the concept on average, and lower"
    source = "Fisher (1936), doi:10.1111/j.1469-1809.1936.tb02137.x; weights of our own (bench.recipe.preference)"

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        judge = load_file(emoji.PREFERENCE / "judge.safetensors")
        self.directions, self.means = judge["directions"].float(), judge["means"].float()
        self.features = EfficientNetLite0(self.device)
        self.concepts = {name: i for i, concept in enumerate(emoji.concepts()) for name in concept["names"]}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        concepts = [self.concept(prompt) for prompt in prompts]
        distance = (self.features(images) @ self.directions - self.means[concepts]).square().sum(1)
        return -distance.to(images.device)

    def concept(self, prompt: str) -> int:
        """The concept that a prompt names, by the longest of its names: "green apple" is no apple."""
        words = f" {prompt.replace(',', ' ')} "
        if named := [name for name in self.concepts if f" {name} " in words]:
            return self.concepts[max(named, key=len)]
        raise BenchError(
            f"emoji_gold knows the 123 concepts of the embedded priors, and the prompt {prompt!r} names none of them: "
            "leave it out, or use prompts of the set 'emoji'."
        )
