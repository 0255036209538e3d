"""`model.offload`: text encoders and decoder are on the device only while they work, and no number changes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scaffold import pipeline_model, trained

from bench.models import catalogue
from bench.models.export import export_layouts
from bench.models.pipeline import PipelineModel

PROMPTS = ["cat", "red bird", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nabla-bench" / "prompts"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that are read from a folder, as they are."""
    names: list[str] = []
    whole = PipelineModel.open

    def opened(self: PipelineModel, *arguments: object, **options: object) -> object:
        pipe = whole(self, *arguments, **options)
        names.extend(name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module))
        return pipe

    monkeypatch.setattr(PipelineModel, "open", opened)
    return names


def assert_same(one: PipelineModel, other: PipelineModel, prompts: list[str] = PROMPTS) -> None:
    theirs, ours = other.encode(prompts).parts, one.encode(prompts).parts
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", ["sdxl", "sd35_medium", "flux_dev", "flux2_klein"], indirect=True)
def test_every_family_gives_the_same_bits_without_its_text_encoders(family: str, loaded: list[str]) -> None:
    folder, kind = catalogue.pipeline_folder(family), catalogue.model_class(family)
    plain = pipeline_model(folder, kind, dtype="bfloat16")
    z = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    for stored in (False, True):
        loaded.clear()
        model = pipeline_model(folder, kind, dtype="bfloat16", offload=True)
        assert model.fingerprint() == plain.fingerprint()
        assert_same(model, plain)
        assert_same(model.with_guidance(2.0), plain.with_guidance(2.0))
        assert torch.equal(model.decode(z), plain.decode(z))
        assert any(name.startswith("text_encoder") for name in loaded) != stored


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_and_resumes_without_text_encoders(
    pipeline_folder: Path, tmp_path: Path, loaded: list[str], checkpointing: bool
) -> None:
    """The reward's gradient passes through the decoder, whose weights must outlast the forward pass."""
    options = {"checkpointing": checkpointing}
    plain = trained(pipeline_model(pipeline_folder, **options), tmp_path / "plain")
    loaded.clear()
    trained(pipeline_model(pipeline_folder, offload=True, **options), tmp_path / "run")
    assert loaded == ["vae", "unet", "text_encoder"]
    *_, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    last.unlink()
    loaded.clear()
    resumed = trained(pipeline_model(pipeline_folder, offload=True, **options), tmp_path / "run")
    assert loaded == ["vae", "unet"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in plain.items())


def test_the_same_prompt_of_other_encoders_is_not_taken_for_it(pipeline_folder: Path, tmp_path: Path) -> None:
    model = pipeline_model(pipeline_folder, offload=True)
    model.encode(PROMPTS)
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    file = other / "text_encoder" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert (
        pipeline_model(other, offload=True).fingerprint() == pipeline_model(other).fingerprint() != model.fingerprint()
    )
    assert_same(pipeline_model(other, offload=True), pipeline_model(other))


def test_what_is_damaged_on_disk_is_computed_anew(pipeline_folder: Path, cache: Path) -> None:
    plain = pipeline_model(pipeline_folder)
    assert_same(pipeline_model(pipeline_folder, offload=True), plain)
    for path in cache.iterdir():
        path.write_bytes(b"{}")
    model = pipeline_model(pipeline_folder, offload=True)
    assert model.fingerprint() == plain.fingerprint()
    assert_same(model, plain)


def test_what_is_exported_is_whole(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline_model(pipeline_folder, offload=True).encode(PROMPTS)
    export_layouts(pipeline_model(pipeline_folder, offload=True), tmp_path / "export")
    assert_same(pipeline_model(tmp_path / "export" / "merged"), pipeline_model(pipeline_folder))
