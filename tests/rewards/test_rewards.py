"""Rewards against closed forms, other routes to the same number, and finite differences."""

import json
import string
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.rewards.colorfulness import Colorfulness
from bench.rewards.emoji_clip import EmojiClip
from bench.rewards.emoji_style import EmojiStyle
from bench.rewards.jpeg_compressibility import JpegCompressibility
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ResNetConfig, ResNetForImageClassification

from bench import Reward

SIDE = 8
PROMPTS = ["a red apple", "a cat"]


def images(seed: int, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that make the output depend visibly on the input (initial ones nearly do not)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write_preprocessor(folder: Path) -> None:
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "size": SIDE}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = tower | {"image_size": SIDE, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    randomised(model).half().save_pretrained(folder)
    write_preprocessor(folder)
    return folder


@pytest.fixture(scope="module")
def style_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    names = dict(enumerate(("noto", "twemoji", "fluent")))
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        id2label=names,
        label2id={style: i for i, style in names.items()},
    )
    randomised(ResNetForImageClassification(config)).save_pretrained(folder)
    write_preprocessor(folder)
    return folder


def clip_reward(folder: Path) -> EmojiClip:
    return EmojiClip(EmojiClip.Config(folder=folder))


def style_reward(folder: Path, style: str = "fluent") -> EmojiStyle:
    return EmojiStyle(EmojiStyle.Config(folder=folder, style=style))


def test_clip_is_the_models_own_similarity(clip_folder: Path) -> None:
    batch = images(0)
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(PROMPTS, padding=True, return_tensors="pt")
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    with torch.no_grad():
        output = model(**tokens, pixel_values=(batch - mean) / std)
    expected = 100 * output.logits_per_image.diagonal() / model.logit_scale.exp()
    scores = clip_reward(clip_folder)(batch, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-5, atol=1e-4)
    assert abs(float(scores[0] - scores[1])) > 1e-2


def test_clip_score_of_a_prompt_does_not_depend_on_its_neighbours(clip_folder: Path) -> None:
    together = clip_reward(clip_folder)
    together(images(0), PROMPTS)
    alone = clip_reward(clip_folder)
    one = images(1)[:1]
    assert torch.equal(together(one, PROMPTS[1:]), alone(one, PROMPTS[1:]))


def test_style_is_a_log_probability(style_folder: Path) -> None:
    batch = images(2)
    scores = {style: style_reward(style_folder, style)(batch, PROMPTS) for style in ("noto", "twemoji", "fluent")}
    torch.testing.assert_close(torch.stack(list(scores.values())).exp().sum(0), torch.ones(2))
    model = ResNetForImageClassification.from_pretrained(style_folder).eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    logits = model((batch - mean) / std).logits
    torch.testing.assert_close(scores["twemoji"], logits.log_softmax(1)[:, 1].detach())


def test_style_refuses_an_unknown_style(style_folder: Path) -> None:
    with pytest.raises(ValueError, match="noto"):
        style_reward(style_folder, "openmoji")


@pytest.mark.parametrize("name", ["colorfulness", "emoji_clip", "emoji_style"])
@pytest.mark.parametrize("side", [SIDE, SIDE + 5])
def test_gradient_is_the_finite_difference(name: str, side: int, clip_folder: Path, style_folder: Path) -> None:
    reward: Reward
    if name == "colorfulness":
        reward = Colorfulness(Colorfulness.Config())
    else:
        reward = clip_reward(clip_folder) if name == "emoji_clip" else style_reward(style_folder)
        (reward.clip if name == "emoji_clip" else reward).model.double()
    assert reward.differentiable
    batch = images(3, side, torch.float64).requires_grad_()
    direction = images(4, side, torch.float64) - 0.5
    scores = reward(batch, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), batch)
    step = 1e-5 * direction
    with torch.no_grad():
        numeric = (reward(batch + step, PROMPTS) - reward(batch - step, PROMPTS)) / 2e-5
    assert float(numeric.abs().min()) > 1e-4
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), numeric, rtol=1e-5, atol=1e-8)


def test_colorfulness_of_known_images() -> None:
    batch = torch.zeros(3, 3, SIDE, SIDE)
    batch[0, 0] = 1  # red everywhere: no spread, means 255 and 127.5
    batch[1, 0, : SIDE // 2] = batch[1, 1, SIDE // 2 :] = 1  # half red, half green: spread 255, means 0 and 127.5
    batch[2] = 0.4  # grey
    expected = torch.tensor([0.3 * (255**2 + 127.5**2) ** 0.5, 255 + 0.3 * 127.5, 0.0])
    torch.testing.assert_close(Colorfulness(Colorfulness.Config())(batch, []), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_colorfulness_gradient_is_finite_on_grey_images(value: float) -> None:
    batch = torch.full((1, 3, SIDE, SIDE), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(Colorfulness(Colorfulness.Config())(batch, []).sum(), batch)
    assert bool(gradient.isfinite().all())


def test_jpeg_reward_is_minus_the_file_size() -> None:
    noise, flat = images(5, 32)[:1], torch.full((1, 3, 32, 32), 0.5)
    reward = JpegCompressibility(JpegCompressibility.Config())
    assert not reward.differentiable
    noisy, plain = reward(torch.cat([noise, flat]).requires_grad_(), PROMPTS)
    assert noisy < plain - 1
    buffer = BytesIO()
    array = np.rint(255 * noise[0].permute(1, 2, 0).numpy()).astype(np.uint8)
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    assert float(noisy) == pytest.approx(-len(buffer.getvalue()) / 1000)
