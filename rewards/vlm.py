"""A vision-language model as a judge: it is asked a question about each image, over the protocol of OpenAI's server."""

import contextlib
import hashlib
import json
import logging
import math
import re
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bench import Reward
from bench.hub import project_cache
from bench.runtime.digests import digest
from bench.runtime.files import write_atomic
from bench.service import Missing, Service, ServiceConfig, pixels, png

YES_OR_NO = 'Does this image show "{prompt}"? Answer Yes or No.'
NUMBER = 'How well does this image show "{{prompt}}", from {:g} to {:g}? Answer with one number and nothing else.'
log = logging.getLogger(__name__)


class VLMConfig(ServiceConfig):
    """The model, what it is asked, and how its answer is read. At another address the same model gives its scores."""

    EXECUTION = (*ServiceConfig.EXECUTION, "endpoint", "cache")

    endpoint: str = Field(
        "http://localhost:8000/v1", description="of a server that speaks OpenAI's protocol, such as vLLM's"
    )
    model: str = Field("Qwen/Qwen3-VL-8B-Instruct", description="as the server names it")
    question: str | None = Field(
        None,
        description="{prompt} stands for the prompt, {NAME} for the prompt file's column; null: whether, or how well, "
        "the image shows the prompt",
    )
    scale: Literal["probability", "log_odds"] | tuple[float, float] = Field(
        "probability",
        description="of Yes against No, as first token of the answer; or [lowest, highest] of the number it answers",
    )
    cache: bool = Field(True, description="keep answers in the project's cache, by image, question, model and endpoint")


class VLM(Reward):
    """What a vision-language model on a server answers to a question about the image: P(Yes), or a number.

    `σ(ℓ_Yes − ℓ_No)` of the log-probabilities of the first token, summed over spellings. A server returns the most
    probable tokens only: of Yes and No the one that is not among them has the least log-probability returned. An answer
    without either, and a number that is missing, not alone or beyond the scale, is a missing score.
    """

    Config = VLMConfig
    config: VLMConfig

    differentiable = False
    may_miss = True
    setup = "a server"
    scale = "0 to 1, the probability of Yes; or as in reward.scale"
    source = "Lin et al. (2024), arXiv:2404.01291, for P(Yes); any model that a server has"
    suite = "sd15-hps"

    def __init__(self, config: VLMConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.service = Service("vlm", config)
        numbers = None if isinstance(config.scale, str) else config.scale
        self.question = config.question or (NUMBER.format(*numbers) if numbers else YES_OR_NO)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pairs = list(zip(pixels(images), map(self._ask, prompts), strict=True))
        keys = [self._key(*pair) for pair in pairs]
        asked = dict(zip(keys, pairs, strict=True))  # the same image and question once
        scores = dict(zip(asked, self.service.map(lambda key: self._score(key, *asked[key]), asked), strict=True))
        values = [math.nan if (score := scores[key]) is None else score for key in keys]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _ask(self, prompt: str) -> str:
        """The question with the prompt, and what its file says of it, in their places."""
        return re.sub(r"\{(\w+)\}", lambda m: prompt if m[1] == "prompt" else self.column(m[1], prompt), self.question)

    def _key(self, image: np.ndarray, question: str) -> str:
        """Of everything that the score of a uint8 image [H, W, 3] depends on."""
        contents = hashlib.blake2b(image.tobytes()).hexdigest()
        return digest([self.config.endpoint, self.config.model, self.config.scale, question, image.shape, contents])

    def _score(self, key: str, image: np.ndarray, question: str) -> float:
        """The score in the cache, or the server's. Raises Missing, and then stores nothing."""
        path = project_cache() / "vlm" / f"{key}.json"
        if self.config.cache:
            with contextlib.suppress(OSError, ValueError):  # not there, or damaged
                return float(json.loads(path.read_bytes()))
        numeric = not isinstance(self.config.scale, str)
        answer = self.service.post("/chat/completions", _request(self.config.model, image, question, numeric))
        try:
            score = self._read(answer["choices"][0])
        except (KeyError, IndexError, TypeError) as error:
            raise Missing(f"an answer lacks {error}") from error
        if self.config.cache:
            try:
                write_atomic(path, json.dumps(score).encode())
            except OSError as error:  # the cache only saves requests
                log.warning("vlm: cannot store a score: %s", error)
        return score

    def _read(self, choice: dict[str, Any]) -> float:
        """The score in an answer. Raises Missing, or an error of what is not there, if there is none."""
        if isinstance(self.config.scale, str):
            odds = log_odds(choice["logprobs"]["content"][0]["top_logprobs"])
            return odds if self.config.scale == "log_odds" else (1 + math.tanh(odds / 2)) / 2
        return number(choice["message"]["content"], *self.config.scale)


def log_odds(tokens: list[dict[str, Any]]) -> float:
    """`ℓ_Yes − ℓ_No` of the first token's most probable values. Raises Missing if neither is among them."""
    found: dict[str, list[float]] = {"yes": [], "no": []}
    for token in tokens:
        found.get(token["token"].strip().lower(), []).append(float(token["logprob"]))
    if not any(found.values()):
        said = ", ".join(repr(token["token"]) for token in tokens[:3])
        raise Missing(f"an answer begins with neither Yes nor No but {said or 'nothing'}")
    floor = min(float(token["logprob"]) for token in tokens)
    yes, no = (float(np.logaddexp.reduce(values)) if values else floor for values in found.values())
    return yes - no


def number(text: str, lowest: float, highest: float) -> float:
    """The one number in a text. Raises Missing if there is none, or several, or it lies beyond the scale."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(found) != 1 or not lowest <= float(found[0]) <= highest:
        raise Missing(f"the answer {text[:60]!r} is not one number from {lowest:g} to {highest:g}")
    return float(found[0])


def _request(model: str, image: np.ndarray, question: str, numeric: bool) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
    answer = {"max_tokens": 16} if numeric else {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    return {"model": model, "messages": messages, "temperature": 0, **answer}
