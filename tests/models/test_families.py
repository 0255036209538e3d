"""Families of pipelines: each agrees with diffusers' own call, and so does what it stores."""

import inspect

import diffusers
import pytest
import torch
from example_families import FAMILIES, NEWER, SAMPLES, SMALL, agree_from_prompts, loaded
from PIL import Image

from bench.config import resolve
from bench.diagnose.selftest import models
from bench.diagnose.selftest.scaffold import perturb
from bench.models.catalogue import load_model, repository
from bench.models.export import export_layouts
from bench.runs.adapter import redraw
from bench.sampling.noise import Noise
from bench.settings import LoraConfig, ModelConfig, SamplerConfig


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_family_equals_diffusers_to_the_bit(family):
    """Images of the pipeline's own call, also with an adapter that it loads; then where it reads the prompts itself."""
    models.its_pipeline_agrees(family)
    model = loaded(family, alpha=4)
    agree_from_prompts(model, **{"negative_prompt": [""] * 3} if family == "qwen-image" else {})  # none: no guidance
    if "negative_prompt" in inspect.signature(model.pipeline.__call__).parameters and model.rows(2) == 2:
        agree_from_prompts(loaded(family, negative_prompt="a fox").with_guidance(2.0), negative_prompt=["a fox"] * 3)


@pytest.mark.parametrize("family", ["sdxl", "emoji_flow"], indirect=True)
@torch.no_grad()
def test_an_exported_pipeline_is_the_finetuned_model(family, tmp_path):
    """Read by the line that the card shows."""
    model = loaded(family, alpha=4)
    perturb(model, 0.1)
    z, t, tiger = Noise(0, "train", SAMPLES[:1])(0, model.latent_shape), torch.tensor(500), model.encode(["tiger"])
    expected, prior = (model.predict(z, t, tiger, prior=prior) for prior in (False, True))
    assert (expected - prior).norm() > 0.01 * expected.norm()
    line = export_layouts(model, tmp_path)["merged"].replace('"merged"', f'"{tmp_path / "merged"}"')
    space = vars(diffusers).copy()
    exec(line, space)
    model.network.load_state_dict(getattr(space["pipe"], model.denoiser).state_dict())
    assert not model.adapters()
    torch.testing.assert_close(model.predict(z, t, tiger), expected, rtol=1e-4, atol=1e-4)


def test_alpha_is_in_the_stored_adapter(pipeline_folder, tmp_path):
    """A scale of alpha over rank other than 1: in diffusers, and read again."""
    model, plain = (
        load_model(ModelConfig(name=str(pipeline_folder), lora=LoraConfig(rank=2, alpha=alpha)), SamplerConfig())
        for alpha in (8, 2)
    )
    perturb(model, 0.1)
    model.save(tmp_path)
    for reader in (model, plain):
        reader.load(tmp_path)
    z, t = Noise(0, "train", SAMPLES)(0, model.latent_shape), torch.tensor(500)
    outputs = [one.predict(z, t, one.encode(["tiger"] * 3)) for one in (model, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in NEWER], indirect=True
)
def test_the_cards_lines_draw_with_the_adapter(family, tmp_path, monkeypatch):
    """As they stand, at the run's size; of a video all frames."""
    model = loaded(str(repository(family).path()), **SMALL.get(family, {}))
    perturb(model, 0.1)
    model.save(tmp_path)
    settings = {"model.name": str(repository(family).path()), "sampler.steps": 2, "sampler.spacing": "auto"}
    settings |= {f"model.{name}": value for name, value in SMALL.get(family, {}).items()}
    monkeypatch.chdir(tmp_path)
    exec(redraw(resolve("ddpo", reward="colorfulness", overrides=settings), model, "tiger", 0), {})
    (drawn,) = tmp_path.glob("redrawn.*")
    with Image.open(drawn) as image:
        frames = model.config.frames
        assert (image.height, image.width, getattr(image, "n_frames", 1)) == (*model.picture_size(), frames)
