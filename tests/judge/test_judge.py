"""`bench judge`: models that other code trained, beside numbers of diffusers' own pipelines."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outside import save_diffusers
from PIL import Image

from bench.evaluation.evaluator import load_reward
from bench.models.catalogue import load_model, make_kernel
from bench.models.pipeline import PipelineModel
from bench.reporting.rows import read_rows
from bench.sampling.noise import Noise
from bench.settings import ModelConfig, SamplerConfig

STEPS = 3
SETTINGS = [
    f"sampler.steps={STEPS}", "evaluation.train_prompts=2", "evaluation.heldout_prompts=1", "evaluation.at=[]",
    "evaluation.samples_per_prompt=2", "evaluation.metrics=[reward,path_kl,output_norm,tilt_gap]",
    "evaluation.rewards=[]", "evaluation.features=efficientnet_lite0", "sampler.spacing=auto", "sampler.eta=1",
    "train.micro_batch=4", "train.sample_batch=4",
]  # fmt: skip
FAMILIES = ["sdxl", "sd35_medium", "flux_dev", "flux2_klein"]


@pytest.fixture
def judge(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Call `bench judge` with small settings and the reward colorfulness."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("cat\ndog\nred bird\nfish\nbear\napple\n")

    def call(*words: object, settings: tuple[str, ...] = (), **options: object) -> tuple[int, str]:
        named = {"reward": "colorfulness", "prompts": tmp_path / "prompts.txt", "out": tmp_path / "judged"} | options
        given = [word for key, value in named.items() if value is not None for word in (f"--{key}", value)]
        return bench("judge", *words, *given, *(w for one in (*SETTINGS, *settings) for w in ("--set", one)))

    return call


def rows_of(folder: Path) -> Any:
    """Metric → row of a run."""
    return read_rows(folder / "rows.parquet").set_index("metric")


def two_rows(folder: Path) -> tuple[Any, Any, Path]:
    """The rows with noise, those without, and the folder of the latter."""
    both = {json.loads((rows := rows_of(path))["settings"].iloc[0])["evaluation.sampler.eta"]: (rows, path)
            for path in folder.iterdir()}  # fmt: skip
    return both[None][0], *both[0.0]


def fresh(name: str | Path) -> tuple[PipelineModel, Any]:
    """The prior, and its pipeline as diffusers alone reads it."""
    model = load_model(ModelConfig(name=str(name), finetune="none"), SamplerConfig(guidance=3.0))
    return model, model.open()


def by_diffusers(model: PipelineModel, pipe: Any, samples: list[tuple[str, int]], **inputs: object) -> torch.Tensor:
    """Images in [0, 1] that the pipeline's own call draws from the evaluation's first noise, without noise between."""
    prompts = [prompt for prompt, _ in samples]
    kernel = make_kernel(model.spec, SamplerConfig(steps=STEPS, eta=0.0, guidance=3.0))
    model.pipeline_inputs = lambda conditioning: {"prompt": prompts, "guidance_scale": 3.0, **inputs}  # type: ignore
    z = Noise(0, "evaluate", samples)(0, model.latent_shape)
    with torch.no_grad():
        return model.call_pipeline(pipe, model.encode(prompts), z, kernel, "pt")


def require_the_images_of_diffusers(
    folder: Path, rows: Any, name: str | Path, load: Callable[[Any], object], **inputs: object
) -> None:
    """Images and rewards of a judged row without noise are those of diffusers' call, the prior's too."""
    index = list(csv.DictReader((folder / "images" / "index.csv").open()))
    samples = [(line["prompt"], int(line["sample"])) for line in index]
    train = [line["split"] == "train" for line in index]
    model, pipe = fresh(name)
    drawn = {"prior": by_diffusers(model, pipe, samples, **inputs)}
    load(pipe)
    drawn["finetuned"] = by_diffusers(model, pipe, samples, **inputs)
    assert (drawn["finetuned"] - drawn["prior"]).abs().max() > 0.02
    reward, prompts = load_reward("colorfulness"), [prompt for prompt, _ in samples]
    for which, column in (("prior", "prior"), ("finetuned", "value")):
        images = (drawn[which] * 255).round().byte()
        for line, image in zip(index, images, strict=True):
            kept = np.asarray(Image.open(folder / "images" / line[which]).convert("RGB")).astype(int)
            assert np.abs(kept - image.permute(1, 2, 0).numpy()).max() <= (1 if kept.shape[0] <= 128 else 255)
        scores = reward(images.float() / 255, prompts)[torch.tensor(train)]
        assert rows.loc["reward/train", column] == pytest.approx(float(scores.mean()), rel=2e-3, abs=2e-2)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_an_adapter_of_peft_and_diffusers_draws_the_images_of_diffusers(family, judge, tmp_path):
    """Every family: an adapter that diffusers stores, with a scale in its metadata, at scale 0.5."""
    model, pipe = fresh(family)
    adapter = save_diffusers(pipe, model.denoiser, tmp_path / "lora")
    status, text = judge(adapter, "--ode", model=family, scale=0.5, settings=("sampler.guidance=3",))
    assert status == 0, text
    noisy, rows, folder = two_rows(tmp_path / "judged")

    def load(pipe: Any) -> None:
        pipe.load_lora_weights(adapter, adapter_name="theirs")
        pipe.set_adapters(["theirs"], [0.5])

    require_the_images_of_diffusers(folder, rows, family, load)
    assert (
        noisy.loc["path_kl", "value"] > 0 and noisy.loc["tilt_gap", "difference"] == noisy.loc["tilt_gap", "difference"]
    )
    assert rows["value"].isna()["path_kl"] and rows.loc["output_norm", "value"] != 1
