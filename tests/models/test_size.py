"""Sizes of pictures and videos."""

import json
import shutil

import pytest
import torch
from example_families import SAMPLES, VIDEO, agree_from_prompts, loaded

from bench.core import Core
from bench.diagnose.selftest import models
from bench.errors import BenchError
from bench.evaluation.draw import draw
from bench.evaluation.scores import load_reward
from bench.models.architecture import build
from bench.models.catalogue import repository
from bench.models.random_weights import write
from bench.sampling.noise import Noise, seeded
from bench.sampling.trajectory import Batch, rollout


@torch.no_grad()
@pytest.mark.parametrize("family", [VIDEO], indirect=True)
def test_one_frame_is_a_picture_and_several_are_a_video(family):
    """To the bit those of the pipeline's own call; the latents too, and those of a size that is not square."""
    prints = set()
    for frames, latents in ((1, (4, 1, 8, 12)), (5, (4, 2, 8, 12))):
        model = loaded(family, frames=frames).with_guidance(1.0)
        assert model.latent_shape == latents
        prints.add(model.fingerprint())
        kernel, noise = models._kernel(model, 3), Noise(0, "evaluate", SAMPLES)
        prompts, z = [prompt for prompt, _ in SAMPLES], noise(0, model.latent_shape)
        ours = rollout(model, kernel, Batch(prompts, SAMPLES, model.encode(prompts)), noise).latents[:, -1]
        pipe = model.open()
        assert torch.equal(model.call_pipeline(pipe, model.encode(prompts), z, kernel, "latent"), ours)
        core = Core(model, kernel, load_reward("colorfulness"), beta=1.0)
        drawn = draw(core, SAMPLES, ["train"] * 3, seed=0)
        seen = drawn.images if frames == 1 else drawn.videos
        theirs = model.call_pipeline(pipe, model.encode(prompts), z, kernel, "pt")
        assert torch.equal(seen, (theirs * 255).round().byte())
        assert (drawn.videos is None) == (frames == 1)
        assert seen.shape == (3, *((5,) if frames > 1 else ()), 3, 64, 96)
        assert torch.equal(drawn.images, seen if frames == 1 else seen[:, 2])
    assert len(prints) == 2  # samples of one are never taken for the other's


@torch.no_grad()
def test_wan_22_is_read_where_one_transformer_denoises_at_every_level(hub, tmp_path):
    """Its autoencoder packs 2×2 pixels, and its pipeline gives each token its time; a pair is refused."""
    write([repository(VIDEO)], hub, "tiny")
    folder = shutil.copytree(repository(VIDEO).path(), tmp_path / "wan22")
    vae = {"base_dim": 4, "decoder_base_dim": 4, "is_residual": True, "in_channels": 12, "out_channels": 12,
           "patch_size": 2, "scale_factor_spatial": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": 4,
           "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}  # fmt: skip
    shutil.rmtree(folder / "vae")
    with seeded(0, "wan22"):
        build("AutoencoderKLWan", vae).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"expand_timesteps": True, "boundary_ratio": None, "transformer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = loaded(str(folder), size=[64, 96], frames=5)
    assert model.latent_shape == (4, 2, 4, 6)
    agree_from_prompts(model)
    index["transformer_2"] = index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BenchError, match="transformer_2"):
        loaded(str(folder))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("emoji", "model.size=[64,64]", "the files of a StableDiffusionPipeline say how large its pictures are"),
        ("emoji", "model.frames=5", "a StableDiffusionPipeline draws pictures"),
        ("qwen-image", "model.frames=5", "a QwenImagePipeline draws pictures"),
        ("qwen-image", "model.size=[500,512]", "both have to be multiples of 16"),
        (VIDEO, "model.size=[64,88]", "both have to be multiples of 16"),
        (VIDEO, "model.frames=4", "this autoencoder's videos have 1, 5, 9, 13, … frames"),
        ("ring", "model.frames=5", "'ring' draws points"),
        ("emoji_mixture", "model.size=[64,64]", "'emoji_mixture' is no pipeline"),
    ],
)
def test_a_size_that_cannot_be_is_refused(bench, tmp_path, monkeypatch, untried, name, settings, words):
    """Also where the weights are not here."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    status, text = bench("run", "ddpo", "--model", name, "--reward", "colorfulness", "--dry-run", "--set", settings)
    assert (status, words in " ".join(text.split())) == (2, True), text
