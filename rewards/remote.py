"""A reward behind an HTTP service of one's own: a network whose dependencies cannot live in this environment."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from bench import Reward
from bench.errors import BenchError
from bench.service import Service, ServiceConfig, pixels, png


class RemoteConfig(ServiceConfig):
    """How many images a request has. Another address is another reward."""

    EXECUTION = (*ServiceConfig.EXECUTION, "batch")

    batch: int = Field(16, ge=1, description="images of a request")


class Remote(Reward):
    """The scores of a service: PNG images with their prompts are posted to it, and it answers with numbers.

    It gets `{"images": […base64 PNG], "prompts": […], "metadata": [{column: text}]}` and answers `{"scores": […]}`, a
    number for each image, or null where it has none.
    """

    Config = RemoteConfig
    config: RemoteConfig

    differentiable = False
    may_miss = True
    setup = "a service"
    scale = "the service's"
    source = "the service at reward.endpoint"
    suite = "sd15-hps"

    def __init__(self, config: RemoteConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.service = Service("remote", config)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pictures, size = pixels(images), self.config.batch
        bodies = [
            {
                "images": [png(image) for image in pictures[start : start + size]],
                "prompts": prompts[start : start + size],
                "metadata": [dict(self.metadata.get(prompt, {})) for prompt in prompts[start : start + size]],
            }
            for start in range(0, len(prompts), size)
        ]
        parts = self.service.map(self._scores, bodies)
        scores = [parts[row // size][row % size] if parts[row // size] else math.nan for row in range(len(prompts))]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _scores(self, body: dict[str, Any]) -> list[float]:
        """The scores of a request, NaN for null. Raises BenchError for an answer of another form."""
        count, answer = len(body["images"]), self.service.post("", body)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        numbers = isinstance(scores, list) and all(one is None or isinstance(one, int | float) for one in scores)
        if not numbers or len(scores) != count:
            raise BenchError(
                f"remote: {self.config.endpoint} answered {str(answer)[:100]!r} to {count} images: it must answer "
                '{"scores": […]} with a number or null for each.'
            )
        return [math.nan if one is None else float(one) for one in scores]
