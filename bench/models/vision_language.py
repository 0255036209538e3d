"""Vision-language models of Qwen's, as rewards ask them: one image and one text a row, differentiable in the image."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGE = "<|image_pad|>"  # the token that stands for a part of the image
READER = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.json")


def reader_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as these models were trained, and float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Reader:
    """Makes of images and texts what a Qwen-VL network takes.

    folder: with the files of `READER`. pixels: of the resized image, least and most; None: as the folder says.
    """

    def __init__(self, folder: Path, pixels: tuple[int, int] | None = None):
        from transformers import AutoTokenizer, Qwen2VLImageProcessor  # take seconds; a listing asks for names alone

        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf8"))
        if pixels:
            settings |= {"min_pixels": pixels[0], "max_pixels": pixels[1]}
        self.image_processor = Qwen2VLImageProcessor(**settings)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="right")
        self.template = json.loads((folder / "chat_template.json").read_text(encoding="utf8"))["chat_template"]

    def __call__(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """The network's inputs for float images [B, 3, H, W] in [0, 1], each shown before its text; padded behind."""
        seen = self.image_processor(list(images), do_rescale=False, return_tensors="pt")
        grid = seen.image_grid_thw[0]
        marks = IMAGE * int(grid.prod() // self.image_processor.merge_size**2)
        chats = [self._chat(text).replace(IMAGE, marks, 1) for text in texts]
        tokens = self.tokenizer(chats, padding=True, return_tensors="pt").to(images.device)
        return {
            **tokens,
            "mm_token_type_ids": (tokens.input_ids == self.tokenizer.convert_tokens_to_ids(IMAGE)).int(),
            "pixel_values": seen.pixel_values,
            "image_grid_thw": seen.image_grid_thw.to(images.device),
        }

    def _chat(self, text: str) -> str:
        message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self.tokenizer.apply_chat_template(
            [message], chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
