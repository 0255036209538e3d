"""The shipped prior and its reward networks load by public code alone, and know what they draw."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer, ResNetForImageClassification

from bench.evaluation.features import EfficientNetLite0
from bench.models.emoji import GUIDANCE, STYLES, concepts, path
from bench.recipe.art import ART_SIZE, SIZE, Concept, augment, caption

NAMES = (
    "tiger",
    "penguin",
    "strawberry",
    "butterfly",
    "octopus",
    "carrot",
    "fox",
    "banana",
    "frog",
    "zebra",
    "owl",
    "crab",
)


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(path(), local_files_only=True).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def images(pipeline):
    """Four samples of each of NAMES."""
    prompts, generator = [name for name in NAMES for _ in range(4)], torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 20, "guidance_scale": GUIDANCE, "height": SIZE, "width": SIZE}
    return pipeline(prompts, generator=generator, output_type="pt", **settings).images


def test_weights_are_small_and_hold_no_pickle():
    files = [file for file in path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}


def test_samples_are_finite_images(images):
    assert images.shape == (4 * len(NAMES), 3, SIZE, SIZE)
    assert torch.isfinite(images).all()
    assert images.min() >= 0
    assert images.max() <= 1


def test_schedule_gives_every_transition_a_density(pipeline):
    assert pipeline.scheduler.config.set_alpha_to_one is False
    assert pipeline.scheduler.final_alpha_cumprod < 1


def test_clip_prefers_the_prompted_name(images):
    folder = path() / "clip"
    model, tokenizer = CLIPModel.from_pretrained(folder).float(), CLIPTokenizer.from_pretrained(folder)
    names = [concept["name"] for concept in concepts()]
    words = tokenizer(names, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model(input_ids=words, pixel_values=2 * images - 1).logits_per_image
    right = torch.tensor([names.index(name) for name in NAMES]).repeat_interleave(4)
    rank = (scores > scores.gather(1, right[:, None])).sum(1)
    assert (rank < 1).float().mean() > 0.3  # chance is below 1 %
    assert (rank < 5).float().mean() > 0.5  # and below 5 %


def test_style_classifier_gives_a_distribution(images):
    model = ResNetForImageClassification.from_pretrained(path() / "style").float().eval()
    assert tuple(model.config.id2label[i] for i in range(len(STYLES))) == STYLES
    with torch.no_grad():
        share = model(2 * images - 1).logits.softmax(1)
    torch.testing.assert_close(share.sum(1), torch.ones(len(images)))
    assert (share.mean(0) > 0.05).all()  # prompts without a style word are drawn in all of them


def test_features(images):
    features = EfficientNetLite0()
    found = features(images[:6])
    assert found.shape == (6, features.dimension)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:1], features(images[:1]), rtol=1e-3, atol=1e-3)


def test_augmentation_depends_on_its_generator_alone():
    art = torch.zeros(5, 4, ART_SIZE, ART_SIZE, dtype=torch.uint8)
    art[:, :, 16:48, 16:48] = 255
    before = torch.get_rng_state()
    first, again = (augment(art, torch.Generator().manual_seed(1)) for _ in range(2))
    other = augment(art, torch.Generator().manual_seed(2))
    assert first.shape == (5, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert first.min() >= 0
    assert first.max() <= 1
    torch.testing.assert_close(first[:, :, SIZE // 2, SIZE // 2], torch.ones(5, 3))  # the art hides the background


def test_captions_are_seeded_and_name_the_style_half_the_time():
    concept = Concept("tiger", ("tiger", "big cat"), "animal", "1f42f")
    texts = [[caption(concept, "noto", rng) for _ in range(400)] for rng in map(np.random.default_rng, (3, 3))]
    assert texts[0] == texts[1]
    assert 0.4 < np.mean(["noto" in text for text in texts[0]]) < 0.6
    assert not any(style in text for text in texts[0] for style in ("twemoji", "fluent"))
