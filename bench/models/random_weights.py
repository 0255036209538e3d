"""Random weights in the layout of the real files, for measuring speed and memory and for testing the loading code.

`write` fills a hub cache (`models--org--name/{refs/main,snapshots/<revision>/…}`) with everything that a setting needs
and whose architecture is known here, full size or scaled down. The real code then loads it. Each size has a revision
that no commit has (`bench.hub.RANDOM`), so that rows made with such weights are recognised and left out of tables.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

from bench.errors import BenchError
from bench.hub import RANDOM, Repository, Requirement
from bench.models import random_encoders
from bench.models.architecture import Size
from bench.models.card import HubCard
from bench.models.cards import CARDS
from bench.models.random_encoders import alive, clip_tokenizer
from bench.sampling.noise import seeded


def write(needs: Iterable[Requirement], cache: Path, size: Size = "full") -> None:
    """Write a stand-in for every repository of `needs` into the hub cache `cache`; one of this size stays as it is.

    Raises BenchError for a repository whose architecture is not known here.
    """
    for need in needs:
        if not isinstance(need, Repository) or need.name not in WRITERS:
            raise BenchError(
                f"there is no architecture of {need.source} to fill with random weights. Known: {', '.join(WRITERS)}."
            )
        kind = "datasets" if need.dataset else "models"
        root = cache / f"{kind}--{need.name.replace('/', '--')}"
        folder = root / "snapshots" / RANDOM[size]
        if not folder.is_dir():
            folder.mkdir(parents=True)
            with seeded(0, need.name), torch.no_grad():
                WRITERS[need.name](folder, size)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(RANDOM[size], encoding="utf8")


def write_pipeline(card: HubCard, folder: Path, size: Size) -> None:
    """Write the repository of a named model."""
    architecture, files = card.architecture, card.repository().files
    parts: dict[str, Any] = {}
    for part in architecture.networks:
        network = architecture.build(part, size)
        network = alive(network) if part in ("unet", "transformer") else network
        parts[part] = nn.Module.to(network, getattr(torch, architecture.dtype))  # diffusers' own warns
    tokenizers = {part: part.replace("text_encoder", "tokenizer") for part in parts if "text_encoder" in part}
    for part, tokenizer in tokenizers.items():
        parts[tokenizer] = TOKENIZERS[architecture.networks[part].kind](folder / tokenizer, size)
    kind, options = architecture.scheduler
    parts["scheduler"] = getattr(diffusers, kind).from_config(options)  # which remembers what other samplers read
    pipe = getattr(diffusers, architecture.pipeline)(**parts, **architecture.options)
    pipe.save_pretrained(folder, max_shard_size="1TB")
    for part, tokenizer in tokenizers.items():
        # the files of the real repositories, which newer tools no longer write
        TOKENIZERS[architecture.networks[part].kind](folder / tokenizer, size)
    for index in (file for file in files if file.endswith(".index.json")):
        stem = index.removesuffix(".safetensors.index.json")
        _shard(folder, index, [file for file in files if file.startswith(f"{stem}-0")])


def _shard(folder: Path, index: str, shards: Sequence[str]) -> None:
    """Split the weights that lie in one file into those that the index names."""
    whole = folder / index.removesuffix(".index.json")
    state, places = load_file(whole), dict[str, str]()
    for number, shard in enumerate(shards):
        part = {name: state[name] for name in sorted(state)[number :: len(shards)]}
        save_file(part, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, Path(shard).name)
    whole.unlink()
    size = sum(tensor.nbytes for tensor in state.values())
    (folder / index).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}), encoding="utf8")


def _t5_tokenizer(folder: Path, size: Size) -> T5Tokenizer:
    """Letters, of T5's kind."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in ("▁", *LETTERS))]
    return T5Tokenizer(vocab=words, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def _qwen_tokenizer(folder: Path, size: Size) -> Qwen2Tokenizer:
    """Letters, of Qwen's kind, with a chat template of its form."""
    words = {word: i for i, word in enumerate((*LETTERS, "Ġ", "Ċ", "<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Qwen2Tokenizer(vocab=words, merges=[], chat_template=template, model_max_length=512)


def _gemma_tokenizer(folder: Path, size: Size) -> GemmaTokenizer:
    """Letters, of Gemma's kind."""
    words = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS)
    tokenizer = GemmaTokenizer({word: i for i, word in enumerate(words)}, model_max_length=512)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-"
TOKENIZERS: dict[str, Callable[[Path, Size], Any]] = {
    "CLIPTextModel": clip_tokenizer,
    "CLIPTextModelWithProjection": clip_tokenizer,
    "T5EncoderModel": _t5_tokenizer,
    "UMT5EncoderModel": _t5_tokenizer,
    "Qwen3ForCausalLM": _qwen_tokenizer,
    "Qwen3Model": _qwen_tokenizer,
    "Qwen2_5_VLForConditionalGeneration": _qwen_tokenizer,
    "Gemma2Model": _gemma_tokenizer,
}
WRITERS: dict[str, Callable[[Path, Size], None]] = {
    **{card.hub: partial(write_pipeline, card) for card in CARDS.values() if isinstance(card, HubCard)},
    **random_encoders.WRITERS,
}
