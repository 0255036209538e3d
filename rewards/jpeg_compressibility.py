"""Compressibility and its opposite: the black-box rewards of DDPO."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import Reward


class JpegCompressibility(Reward):
    """Minus the size in kB (1,000 bytes) of the image as a JPEG of quality 95."""

    differentiable = False
    scale = "minus kilobytes, below 0"
    source = "Black et al. (2023), arXiv:2305.13301"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = (255 * images.detach()).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([-self._bytes(image) / 1000 for image in pixels], device=images.device)

    @staticmethod
    def _bytes(image: np.ndarray) -> int:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        return buffer.tell()


class JpegIncompressibility(JpegCompressibility):
    """The size in kB (1,000 bytes) of the image as a JPEG of quality 95."""

    scale = "kilobytes, above 0"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -super().__call__(images, prompts)
