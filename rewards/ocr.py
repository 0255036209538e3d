"""Whether an image shows the words that its prompt asks for, as PaddleOCR reads it."""

import re

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bench import Config, Reward
from bench.errors import BenchError
from bench.service import pixels


class OCRConfig(Config):
    """What counts as right."""

    strict: bool = Field(False, description="other text around the words costs too; otherwise it is free")


class OCR(Reward):
    """`1 − min(d, |t|)/|t|`: d is the edit distance between the words t and all text that is read, in one line.

    The words are the column `text` of the prompt file, else what stands in the prompt's first pair of quotes. Spaces
    and case do not count. Where the words are a part of what is read, d is 0, unless `strict` is set.
    """

    Config = OCRConfig
    config: OCRConfig

    differentiable = False
    scale = "0 to 1 (every letter right)"
    source = "Chen et al. (2023), arXiv:2305.10855, as used by Flow-GRPO, arXiv:2505.05470; PaddleOCR, English"
    suite = "sd35-ocr"
    setup = "pip install 'nabla-bench[ocr]'"

    def __init__(self, config: OCRConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        try:
            from paddleocr import PaddleOCR
        except ImportError as error:
            raise BenchError(f"the reward 'ocr' needs PaddleOCR: {self.setup} ({error}).") from error
        off = dict.fromkeys(("use_doc_orientation_classify", "use_doc_unwarping", "use_textline_orientation"), False)
        try:
            self.engine = PaddleOCR(lang="en", device="cpu", **off)
        except Exception as error:  # it fetches its weights, and has no error of its own for that
            raise BenchError(
                f"PaddleOCR does not start ({error}): it fetches its weights when it is first used, so start it once "
                "where there is a network."
            ) from error

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = [
            agreement(self.read(image), self.words(prompt), self.config.strict)
            for image, prompt in zip(pixels(images), prompts, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, image: np.ndarray) -> str:
        """All text in a uint8 image [H, W, 3], box after box."""
        blue_first = np.ascontiguousarray(image[..., ::-1])  # as PaddleOCR takes arrays
        return "".join(text for page in self.engine.predict(blue_first) for text in page["rec_texts"])

    def words(self, prompt: str) -> str:
        """The words that the image must show. Raises BenchError for a prompt that asks for none."""
        quoted = re.search(r'["“”]([^"“”]+)["“”]', prompt)
        words = self.metadata.get(prompt, {}).get("text") or (quoted[1] if quoted else "")
        if not plain(words):
            raise BenchError(
                f"the reward 'ocr' finds no words in {prompt!r}: put them in double quotes, or in a column text of the "
                "prompt file."
            )
        return words


def agreement(read: str, words: str, strict: bool = False) -> float:
    """The score of a text that was read, 0 to 1."""
    read, words = plain(read), plain(words)
    if not strict and words in read:
        return 1.0
    return 1 - min(edit_distance(read, words), len(words)) / len(words)


def plain(text: str) -> str:
    """Without spaces and case."""
    return "".join(text.split()).casefold()


def edit_distance(one: str, other: str) -> int:
    """Letters that must be put in, left out or changed (Levenshtein, 1966)."""
    before = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        after = [row]
        for column, there in enumerate(other, 1):
            after.append(min(after[-1] + 1, before[column] + 1, before[column - 1] + (letter != there)))
        before = after
    return before[-1]
