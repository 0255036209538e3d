"""Learned rewards, loaded by the real code from scaled-down random checkpoints in the layout of the real files."""

import math
import shutil

import numpy as np
import open_clip
import pytest
import torch
from bench.rewards.aesthetic import Aesthetic
from bench.rewards.image_reward import MEAN, STD, ImageReward
from bench.rewards.pickscore import WEIGHTS as PICKSCORE
from PIL import Image
from torch import Tensor
from torchvision import transforms
from transformers import CLIPImageProcessor

from bench import registry
from bench.errors import BenchError
from bench.evaluation.scores import load_reward
from bench.hub import CLIP_L, RANDOM
from bench.models.encoders import OPENAI_MEAN, OPENAI_STD
from bench.models.random_encoders import HEAD
from bench.models.random_weights import write
from bench.reward import Reward

LEARNED = ["aesthetic", "hps", "image_reward", "pickscore", "clip_score"]
PROMPTS = ["a red apple", "Two cats, one dog."]


def pictures(height: int = 96, width: int = 96) -> list[Image.Image]:
    """Random blocks under noise, 8-bit."""
    rng = np.random.default_rng(0)
    blocks = rng.random((2, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
    pixels = np.clip(blocks + 0.1 * rng.standard_normal(blocks.shape), 0, 1)
    return [Image.fromarray((255 * image).astype(np.uint8)) for image in pixels]


def as_tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def official_pixels(name: str, reward: Reward, images: list[Image.Image]) -> Tensor:
    """What the official pipeline of a reward feeds to its network: PIL's resize on 8-bit images."""
    if name == "hps":
        side = reward.model.visual.image_size[0]
        preprocess = open_clip.image_transform(side, is_train=False, resize_mode="longest", fill_color=0)
        return torch.stack([preprocess(image) for image in images])
    if name == "image_reward":
        side = reward.vision.config.image_size
        preprocess = transforms.Compose([
            transforms.Resize(side, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
        ])  # fmt: skip
        return torch.stack([preprocess(image) for image in images])
    repository = PICKSCORE if name == "pickscore" else CLIP_L
    side = reward.clip.model.config.vision_config.image_size
    processor = CLIPImageProcessor.from_pretrained(repository.path(), crop_size={"height": side, "width": side})
    return processor(images, return_tensors="pt").pixel_values


def score_pixels(name: str, reward: Reward, pixels: Tensor) -> Tensor:
    """The official score from preprocessed pixels, computed apart from the reward's own call."""
    if name == "hps":
        text = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
        image, text = reward.model.encode_image(pixels, normalize=True), reward.model.encode_text(text, normalize=True)
        return (image @ text.T).diagonal()
    if name == "image_reward":
        tokens = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        seen = reward.vision(pixels).last_hidden_state
        read = reward.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        return (reward.head(read.last_hidden_state[:, 0])[:, 0] - MEAN) / STD
    model = reward.clip.model
    image = model.get_image_features(pixels).pooler_output
    image = image / image.norm(dim=1, keepdim=True)
    if name == "aesthetic":
        return reward.head(image)[:, 0]
    tokens = reward.clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    text = model.get_text_features(**tokens).pooler_output
    text = text / text.norm(dim=1, keepdim=True)
    scale = model.logit_scale.exp() if name == "pickscore" else 100
    return (scale * image @ text.T).diagonal()


def difference(name: str, size: tuple[int, int]) -> tuple[float, float]:
    """Largest difference of a reward's scores to the official pipeline's, and the spread of these."""
    reward, images = load_reward(name), pictures(*size)
    with torch.no_grad():
        expected = score_pixels(name, reward, official_pixels(name, reward, images))
        found = reward(as_tensor(images), PROMPTS)
    return float((found - expected).abs().max()), float((expected[0] - expected[1]).abs())


@pytest.mark.parametrize("size", [(96, 96), (64, 96), (32, 32)])
@pytest.mark.parametrize("name", LEARNED)
def test_the_score_is_the_official_pipelines(hub, name, size):
    """What is left is PIL's rounding to 8 bits, which random networks enlarge more than trained ones would."""
    tolerance = 0.1 if name in ("clip_score", "pickscore") else 0.01  # these two multiply a cosine by 100
    error, spread = difference(name, size)
    assert error <= tolerance
    assert spread > tolerance / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_the_score_is_the_official_pipelines_at_full_size(tmp_path, monkeypatch, record_property, name):
    """The whole architectures with random weights: `--junitxml` keeps the figures."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write(registry.load("rewards", name).files, tmp_path, "full")
    errors = [difference(name, size)[0] for size in ((96, 96), (64, 96), (32, 32), (512, 512))]
    record_property("largest difference", max(errors))
    shutil.rmtree(tmp_path)
    assert max(errors) <= (0.02 if name == "clip_score" else 0.01)  # 100 x a cosine


def test_checkpoints_have_the_official_names_and_shapes(hub):
    """The stand-ins are told from real weights by their revision, and are laid out like them."""
    state = torch.load(ImageReward.files[0].path("ImageReward.pt"), weights_only=True)
    assert {"blip.visual_encoder.cls_token", "blip.visual_encoder.blocks.0.attn.qkv.weight",
            "blip.visual_encoder.patch_embed.proj.bias", "blip.visual_encoder.norm.weight",
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
            "blip.text_encoder.embeddings.position_ids", "mlp.layers.7.bias"} <= state.keys()  # fmt: skip
    assert ImageReward.files[0].path().name == RANDOM["tiny"]


def test_image_reward_loads_every_weight(hub):
    """A name that is mapped to nothing, or a weight left as initialised, would go unseen in a random network."""
    reward = load_reward("image_reward")
    state = torch.load(ImageReward.files[0].path("ImageReward.pt"), weights_only=True)
    stored = sum(v.numel() for name, v in state.items() if not name.endswith("position_ids"))
    parts = (reward.vision, reward.text, reward.head)
    assert sum(p.numel() for part in parts for p in part.parameters()) == stored
    norm = state["blip.visual_encoder.blocks.1.norm2.weight"]
    assert torch.equal(reward.vision.encoder.layers[1].layer_norm2.weight, norm)
    assert reward.vision.config.layer_norm_eps == 1e-6


def test_the_aesthetic_head_of_another_file(hub, tmp_path):
    """The real head's names, order and sizes; linear layers alone, so that it is one affine map."""
    state, inputs = {}, 16
    rng = torch.Generator().manual_seed(0)
    matrix, offset = torch.eye(16), torch.zeros(16)
    for number, outputs in HEAD.items():
        weight = torch.randn(outputs, inputs, generator=rng) / math.sqrt(inputs)
        bias = torch.randn(outputs, generator=rng)
        state |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
        matrix, offset, inputs = weight @ matrix, weight @ offset + bias, outputs
    torch.save(state, tmp_path / "head.pth")
    reward = Aesthetic(Aesthetic.Config(head=tmp_path / "head.pth"))
    x = as_tensor(pictures())
    unit = torch.nn.functional.normalize(reward.clip.images(x), dim=1)
    torch.testing.assert_close(reward(x, PROMPTS), (unit @ matrix.T + offset)[:, 0], rtol=1e-4, atol=1e-5)


def test_a_weighted_sum(hub):
    both = load_reward("hps+0.1*aesthetic-2*jpeg_compressibility")
    x = as_tensor(pictures())
    parts = [load_reward(name)(x, PROMPTS) for name in ("hps", "aesthetic", "jpeg_compressibility")]
    torch.testing.assert_close(both(x, PROMPTS), parts[0] + 0.1 * parts[1] - 2 * parts[2])
    assert not both.differentiable
    whole = registry.load("rewards", "hps+0.1*aesthetic")
    assert whole.differentiable
    assert whole.suite == "sd15-hps"
    assert len(whole.files) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hps+", "cannot read the reward 'hps+' at '+'"),
        ("hps+0.1aesthetic", "at '+0.1aesthetic'"),
        ("hps+1..5*aesthetic", "at '+1..5*aesthetic'"),
        ("hps+hps", "at '+hps'"),
        ("0.1*hps+aestetic", "did you mean 'aesthetic'"),
        ("hps+quadratic", "mixes inputs"),
    ],
)
def test_sums_that_cannot_be_read(text, words):
    with pytest.raises(BenchError, match="reward") as error:
        registry.load("rewards", text)
    assert words in str(error.value)
