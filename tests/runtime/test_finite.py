"""Weights that are no numbers are named where they are read or made."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scaffold import pipeline_model, small_method, trainer_of

from bench.errors import BenchError, NonFiniteError
from bench.models.analytic import RingModel
from bench.models.exact import FILE
from bench.models.lora import LORA_FILE
from bench.training import checkpoint

NUMBERS = pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])


def damage(file: Path, number: float) -> str:
    """Put the number into the last tensor of a safetensors file; its name."""
    state = load_file(file)
    name = sorted(state)[-1]
    state[name].view(-1)[-1] = number
    save_file(state, file, metadata={"format": "pt"})
    return name


@NUMBERS
def test_an_adapter_of_points(number: float, tmp_path: Path) -> None:
    RingModel().save(tmp_path)
    name = damage(tmp_path / FILE, number)
    with pytest.raises(BenchError, match=rf"{FILE}: {name} holds NaN or infinite values"):
        RingModel().load(tmp_path)


@NUMBERS
def test_an_adapter_of_a_pipeline(number: float, pipeline_folder: Path, tmp_path: Path) -> None:
    model = pipeline_model(pipeline_folder)
    model.save(tmp_path)
    name = damage(tmp_path / LORA_FILE, number)
    with pytest.raises(BenchError, match=rf"{LORA_FILE}: {name} holds"):
        model.load(tmp_path)


def test_a_fully_finetuned_denoiser(pipeline_folder: Path, tmp_path: Path) -> None:
    model = pipeline_model(pipeline_folder, finetune="full")
    model.save(tmp_path)
    name = damage(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", float("nan"))
    with pytest.raises(BenchError, match=f"unet: {name} holds"):
        model.load(tmp_path)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_a_prior(part: str, pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    name = damage(folder / f"{part}.safetensors", float("inf"))
    with pytest.raises(BenchError, match=rf"{folder}: {part.partition('/')[0]}\.{name} holds"):
        pipeline_model(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: state["parameters"]["policy"][1].fill_(torch.nan), "parameter 1 of policy"),
        (lambda state: state["copies"]["old"]["a"].fill_(torch.inf), "a of the copy old"),
    ],
)
def test_a_checkpoint(edit: Callable, words: str, tmp_path: Path) -> None:
    state = {"parameters": {"policy": [torch.zeros(2), torch.zeros(3)]}, "copies": {"old": {"a": torch.zeros(2)}}}
    checkpoint.save(tmp_path, 1, state)
    assert checkpoint.load(tmp_path) is not None
    edit(state)
    path = checkpoint.save(tmp_path, 2, state)
    with pytest.raises(BenchError, match=rf"{path.name}: {words} holds"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("network", ["policy", "flow"])
def test_training_stores_none(network: str, core, tmp_path: Path) -> None:
    trainer = trainer_of(core, small_method("nabla_gfn"), tmp_path)
    with torch.no_grad():
        trainer.parameters[network][-1].view(-1)[0] = torch.inf
    with pytest.raises(NonFiniteError, match=rf"left weights that are not finite: .* of (the )?{network}"):
        trainer._save()
    assert checkpoint.newest(tmp_path / "checkpoints") is None
