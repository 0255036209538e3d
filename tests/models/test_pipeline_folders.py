"""What a family of pipelines cannot represent is refused from its files, by file, key and value, before it loads."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import BenchError
from bench.models.catalogue import load_model, make_kernel
from bench.models.checks import check_pipeline
from bench.models.emoji import FLOW
from bench.models.sd3 import StableDiffusion3
from bench.settings import ModelConfig, SamplerConfig

pytestmark = pytest.mark.usefixtures("undrawn")

Change = Callable[[Path], None]


def keys(file: str, **changes: Any) -> Change:
    """Change keys of a JSON file; a None of `changes` is null."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(tree | changes))

    return change


def content(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text) and None


def tensors(part: str, edit: Callable[[dict[str, torch.Tensor], str], None]) -> Change:
    """Edit a part's weights; `edit` also gets the name of the fourth tensor."""

    def change(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        state = load_file(file)
        edit(state, sorted(state)[3])
        save_file(state, file, metadata={"format": "pt"})

    return change


def cut(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
SCHEDULER, UNET, INDEX = "scheduler/scheduler_config.json", "unet/config.json", "model_index.json"
REFUSED: dict[str, tuple[Change, str]] = {
    "sample": (keys(SCHEDULER, prediction_type="sample"), "prediction_type = 'sample'"),
    "flow_prediction": (keys(SCHEDULER, prediction_type="flow_prediction"), "prediction_type = 'flow_prediction'"),
    "flow matching": (keys(INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "FlowMatchEuler"),
    "its config": (keys(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "it can be DDIMScheduler"),
    "unknown scheduler": (keys(INDEX, scheduler=["diffusers", "MyScheduler"]), "'MyScheduler'"),
    "unknown schedule": (keys(SCHEDULER, beta_schedule="cubic"), "describes no DDIMScheduler"),
    "latent consistency": (keys(UNET, time_cond_proj_dim=256), "time_cond_proj_dim = 256"),
    "inpainting": (keys(UNET, in_channels=9), "in_channels = 9 cannot be represented.* as many as the autoencoder"),
    "null size": (keys(UNET, sample_size=None), "sample_size = None"),
    "no size": (keys(UNET, sample_size=[8, "x"]), r"sample_size = \[8, 'x'\]"),
    "class labels": (keys(UNET, class_embed_type="timestep"), "class_embed_type = 'timestep'"),
    "added embedding": (keys(UNET, addition_embed_type="image"), "addition_embed_type|describes no"),
    "unknown key": (keys(UNET, guidance_rescaler=0.7), "guidance_rescaler = 0.7 is no option"),
    "absurd key": (keys(UNET, block_out_channels="many"), "describes no UNet2DConditionModel"),
    "other class": (keys(UNET, _class_name="FluxTransformer2DModel"), "and model_index.json says UNet2DCond"),
    "custom part": (keys(INDEX, unet=["my_unet", "MyUNet"]), "it can be UNet2DConditionModel"),
    "further part": (keys(INDEX, controlnet=["diffusers", "ControlNetModel"]), "the parts of this family are unet"),
    "part left out": (keys(INDEX, tokenizer=[None, None]), "names no tokenizer"),
    "custom pipeline": (keys(INDEX, _class_name=["pipeline", "Mine"]), "supported are StableDiffusionPipeline"),
    "other pipeline": (keys(INDEX, _class_name="KandinskyPipeline"), "'KandinskyPipeline' is not supported"),
    "null part": (keys(INDEX, feature_extractor=None), "feature_extractor = null"),
    "empty entry": (keys(INDEX, safety_checker=[]), r"safety_checker = \[\]; a part is written"),
    "empty index": (content(INDEX, ""), "cannot read .*model_index.json"),
    "listed index": (content(INDEX, "[1]"), "no JSON object"),
    "nothing in the index": (content(INDEX, "{}"), "_class_name = None"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "holds no tokenizer"),
    "half a tokenizer": (content("tokenizer/tokenizer_config.json", "{"), "cannot read"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler_config.json is missing"),
    "pointers": (content("unet/diffusion_pytorch_model.safetensors", LFS), "Git LFS pointer"),
    "pointer to a config": (content(UNET, LFS), "Git LFS pointer"),
    "cut weights": (cut, "not a whole file"),
    "no weights": (lambda folder: (folder / "vae/diffusion_pytorch_model.safetensors").unlink(), "is missing"),
    "text width": (keys(UNET, cross_attention_dim=24), "cross_attention_dim = 24 .* the text encoder's width"),
    **{
        f"{fault} tensor of {part}": (tensors(part, edit), words)
        for part in ("unet", "vae", "text_encoder")
        for fault, edit, words in (
            ("missing", lambda state, name: state.pop(name), f"weights in .*{part} lack "),
            ("unexpected", lambda state, name: state.update(extra=torch.zeros(1)), f"{part} also hold extra"),
            ("misshapen", lambda state, name: state.update({name: torch.zeros(7, 5)}), r"of shape \[7, 5\]; config"),
        )
    },
}  # fmt: skip


@pytest.fixture
def copy(pipeline_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline_folder, tmp_path / "a model of mine")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_a_dry_run(bench, copy: Path, tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    change(copy)
    status, text = bench(
        "run", "--method", "draft_1", "--reward", "colorfulness", "--model", copy, "--dry-run", "--out", tmp_path / "x"
    )
    assert status == 2, text
    assert re.search(words, text), text
    assert str(copy) in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sampler.steps=2000", "the schedule's 1000 steps"),
        ("sampler.spacing=sd3", "not a grid of a diffusion model"),
        ("sampler.final_noise=0.1", "means nothing to a diffusion model"),
        ("evaluation.sampler.rule=euler", "sampler.rule = 'euler'"),
        ("sampler.final_alpha=1", "needs transition densities"),
    ],
)
@pytest.mark.parametrize("model", ["emoji", "ring", None])
def test_a_sampler_that_does_not_fit_is_refused_by_a_dry_run(bench, pipeline_folder, setting, words, model) -> None:
    status, text = bench("run", "--method", "ddpo", "--model", model or pipeline_folder, "--dry-run", "--set", setting)
    assert status == 2, text
    assert words in text


def test_a_picture_that_is_not_square_and_a_path_with_spaces(tiny_run, copy: Path, monkeypatch) -> None:
    """16 × 32 pixels, from a path that begins with `~`."""
    keys(UNET, sample_size=[8, 16])(copy)
    monkeypatch.setenv("HOME", str(copy.parent))
    options = ("--set", "evaluation.metrics=[reward]")
    folder = tiny_run("draft_1", "--model", f"~/{copy.name}", *options, updates=1)
    assert (folder / "rows.parquet").is_file()
    model = load_model(ModelConfig(name=f"~/{copy.name}"), SamplerConfig())
    assert model.decode(torch.zeros(1, *model.latent_shape)).shape == (1, 3, 16, 32)
    assert make_kernel(model.spec, SamplerConfig()).steps == 20


@pytest.mark.parametrize(
    "changes", [{"use_dynamic_shifting": True}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}], ids=str
)
def test_a_flow_scheduler_with_other_levels_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = shutil.copytree(FLOW, tmp_path / "flow")
    keys(SCHEDULER, **changes)(folder)
    ((name, value),) = changes.items()
    with pytest.raises(BenchError, match=f"{name} = {value!r}"):
        check_pipeline(folder, StableDiffusion3, 1.0, only={"scheduler", "transformer"})


def test_a_single_file_is_refused(bench, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    status, text = bench("run", "--method", "ddpo", "--model", tmp_path / "model.safetensors", "--dry-run")
    assert status == 2
    assert f"`bench convert {tmp_path / 'model.safetensors'} --like sd15`" in " ".join(text.split())
