"""Whole commands on every family."""

import pandas as pd
import pytest
from example_families import FAMILIES, METHODS, SMALL, TINY, VIDEO, guidance

from bench.config import resolve
from bench.models.catalogue import repository
from bench.models.lora import add_lora
from bench.runs.estimate import blueprint
from bench.settings import LoraConfig

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT = {("sdxl", "nabla_gfn"), ("sd35_medium", "ddpo"), ("flux2_klein", "adjoint_matching"), (VIDEO, "draft_1")}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in SHORT else pytest.mark.slow)
        for name in FAMILIES
        for method in METHODS
    ],
    indirect=["family"],
)
def test_methods_end_to_end_on_every_family(bench, tmp_path, monkeypatch, family, method):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("cat\ndog\nred bird\nfish\n")
    settings = [*TINY, f"sampler.guidance={guidance(family)}", "train.micro_batch=4", "train.sample_batch=4"]
    settings += ["sampler.spacing=auto", "evaluation.features=efficientnet_lite0"]
    settings += ["method.channels=[32,32]"] if method == "nabla_gfn" else []
    settings += [f"model.{name}={value}" for name, value in SMALL.get(family, {}).items()]
    sets = [word for setting in settings for word in ("--set", setting)]
    status, text = bench(
        "run", "--method", method, "--reward", "colorfulness", "--model", family, "--updates", 1,
        "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run", *sets,
    )  # fmt: skip
    assert status == 0, text
    rows = pd.read_parquet(tmp_path / "run" / "rows.parquet").set_index("metric")
    assert rows.loc["path_kl", "value"] > 0
    assert set(rows["status"]) == {"random weights"}


@pytest.mark.parametrize("name", FAMILIES)
def test_full_sizes_are_known_without_weights(bench, tmp_path, monkeypatch, name):
    """Parameters of the denoisers as their cards have them; a dry run and the sizes of a download."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    parameters = {"sdxl": 2.57e9, "sd35_medium": 2.24e9, "flux2_klein": 3.88e9, "z-image-turbo": 6.15e9,
                  "qwen-image": 20.4e9, "sana-600m": 0.59e9, VIDEO: 1.42e9}.get(name, 11.9e9)  # fmt: skip
    shapes = {"flux2_klein": (128, 64, 64), "sana-600m": (32, 32, 32), VIDEO: (16, 1, 60, 104), "sdxl": (4, 128, 128)}
    config = resolve("ddpo", overrides={"model.name": name})
    pipeline = blueprint(config)
    assert sum(p.numel() for p in pipeline.network.parameters()) == pytest.approx(parameters, rel=0.01)
    assert pipeline.spec.latent_shape == shapes.get(name, (16, 128, 128))
    add_lora(pipeline.network, LoraConfig(), pipeline.family.lora_targets)  # refuses a target that no layer has
    status, text = bench("fetch", "--model", name, "--dry-run")
    assert status == 0, text
    assert repository(name).name in text


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_profile_of_random_weights(bench, tmp_path, name):
    status, text = bench(
        "profile", "--model", name, "--reward", "colorfulness", "--method", "draft_1", "--random-weights", "--size",
        "tiny", "--repeats", 1, "--out", tmp_path / "profile.json", "--set", "sampler.steps=2",
        "--set", f"sampler.guidance={guidance(name)}", "--set", "train.prompts_per_round=2",
        "--set", "train.samples_per_prompt=1", "--set", "sampler.spacing=auto",
    )  # fmt: skip
    assert status == 0, text
    assert "diffusers pipeline" in text
