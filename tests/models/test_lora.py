"""The adapter's options: what they do to the denoiser, and that a stored adapter is the same in diffusers."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from scaffold import pipeline_model

from bench.config import from_settings, read, resolve
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import BenchError
from bench.models.export import export_layouts
from bench.models.lora import LORA_FILE
from bench.models.pipeline import PipelineModel
from bench.models.stable_diffusion import StableDiffusion
from bench.runs.estimate import estimate_memory
from bench.runs.rows import comparable_settings
from bench.sampling.noise import Noise
from bench.settings import LoraConfig

pytestmark = pytest.mark.usefixtures("undrawn")

NAMES = [("cat", 0), ("dog", 0)]
OPTIONS = {
    "DoRA": LoraConfig(rank=2, alpha=4, use_dora=True),
    "names": LoraConfig(rank=2, target_modules=["to_q", "conv1", "time_emb_proj"]),
    "expression": LoraConfig(rank=2, target_modules=r"down_blocks\..*\.to_[qk]"),
    "kaiming": LoraConfig(rank=2, init="kaiming"),
    "DoRA of convolutions": LoraConfig(rank=2, use_dora=True, target_modules=["conv1", "to_v"]),
}
options = pytest.mark.parametrize("lora", OPTIONS.values(), ids=OPTIONS)


def predict(model: PipelineModel, **options: bool) -> torch.Tensor:
    z = Noise(0, "train", NAMES)(0, model.latent_shape)
    return model.predict(z, torch.tensor([500, 20]), model.encode(["cat", "dog"]), **options)


@options
def test_the_adapter_starts_at_the_prior_and_trains(pipeline_folder, model, lora):
    """In 16 bits too; every parameter gets a gradient, and the prior stays what it was."""
    other = pipeline_model(pipeline_folder, lora=lora)
    before = predict(model, prior=True)
    assert torch.equal(predict(other), before)
    half = pipeline_model(pipeline_folder, lora=lora, dtype="bfloat16")
    torch.testing.assert_close(predict(half), predict(half, prior=True), rtol=1e-2, atol=1e-3)
    perturb(other, 0.1)
    predict(other).square().sum().backward()
    assert all(bool(p.grad.any()) for p in other.adapters().values())
    assert torch.equal(predict(other, prior=True), before)
    assert (predict(other) - before).norm() > 1e-3 * before.norm()


@options
def test_every_exported_layout_is_the_adapter(pipeline_folder, tmp_path, lora):
    """Read by diffusers and peft; kohya's is written only where diffusers' reader gives the adapter back."""
    model = pipeline_model(pipeline_folder, lora=lora)
    perturb(model, 0.1)
    z, text = Noise(0, "train", NAMES)(0, model.latent_shape), model.encode(["cat", "dog"]).parts["text"]

    def output(unet: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return unet(z, torch.tensor([500, 20]), text).sample

    expected, prior = output(model.network), output(StableDiffusionPipeline.from_pretrained(pipeline_folder).unet)
    assert (expected - prior).norm() > 1e-3 * expected.norm()
    lines = export_layouts(model, tmp_path)
    assert list(lines) == (["peft", "merged"] if lora.use_dora else ["peft", "kohya", "merged"])
    for layout, line in lines.items():
        space = {"pipe": StableDiffusionPipeline.from_pretrained(pipeline_folder)}
        exec(
            f"from diffusers import StableDiffusionPipeline\n{line}".replace(f'"{layout}"', f'"{tmp_path / layout}"'),
            space,
        )
        torch.testing.assert_close(output(space["pipe"].unet), expected, rtol=1e-4, atol=1e-4)


def test_a_wholly_finetuned_model_is_exported_as_a_pipeline(pipeline_folder, tmp_path):
    model = pipeline_model(pipeline_folder, finetune="full")
    perturb(model, 0.1)
    assert list(export_layouts(model, tmp_path)) == ["merged"]
    stored = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == model.adapters().keys()
    assert all(torch.equal(stored[name], weight) for name, weight in model.adapters().items())


def test_a_16_bit_model_is_merged_in_float32(pipeline_folder, tmp_path):
    """The stored weights are the rounded sum, not the sum of rounded parts."""
    model = pipeline_model(pipeline_folder, dtype="bfloat16")
    perturb(model, 0.1)
    expected = {
        name: (layer.base_layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
        for name, layer in model._lora.layers.items()
    }
    export_layouts(model, tmp_path)
    stored = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(stored[f"{name}.weight"], weight)


def test_norms_of_16_bit_weights_are_not_rounded(pipeline_folder):
    """DoRA divides by the norm of the weights; a rounded one would move the policy off the prior."""
    half = pipeline_model(pipeline_folder, lora=LoraConfig(rank=2, use_dora=True), dtype="bfloat16")
    for name, parameter in half.adapters().items():
        if "magnitude" in name:
            weight = half.network.get_parameter(re.sub(r"lora_magnitude_vector.*", "base_layer.weight", name))
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, torch.linalg.norm(weight.float(), dim=1))


@torch.no_grad()
@options
def test_diffusers_loads_the_stored_adapter(pipeline_folder, tmp_path, lora):
    model = pipeline_model(pipeline_folder, lora=lora)
    perturb(model, 0.1)
    model.save(tmp_path)
    fresh = pipeline_model(pipeline_folder, lora=lora, seed=1)
    fresh.load(tmp_path)
    torch.testing.assert_close(predict(fresh), predict(model), rtol=1e-5, atol=1e-6)
    other = pipeline_model(pipeline_folder, lora=lora, seed=2)
    with other.using({name: p.detach() for name, p in model.adapters().items()}):
        assert torch.equal(predict(other), predict(model))
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    z, t, text = Noise(0, "train", NAMES)(0, model.latent_shape), torch.tensor([500, 20]), model.encode(["cat", "dog"])
    theirs = pipe.unet(z, t, text.parts["text"], return_dict=False)[0]
    torch.testing.assert_close(theirs, predict(model, guided=False), rtol=1e-3, atol=1e-4)


@options
def test_merging_changes_no_prediction(pipeline_folder, lora):
    model = pipeline_model(pipeline_folder, lora=lora)
    perturb(model, 0.1)
    apart = predict(model)
    with model.merged():
        torch.testing.assert_close(predict(model), apart, rtol=1e-4, atol=1e-4)


def test_a_run_trains_a_dora(tiny_run):
    """And its adapter holds the norms."""
    folder = tiny_run("draft_1", "--set", "model.lora.use_dora=true", "--set", "evaluation.metrics=[reward]", updates=1)
    state = load_file(folder / "adapter" / LORA_FILE)
    assert any("lora_magnitude_vector" in name for name in state)


def test_other_targets_are_other_parameters(pipeline_folder):
    model = pipeline_model(pipeline_folder, lora=OPTIONS["expression"])
    assert model.adapters()
    assert all(re.match(r"down_blocks\..*\.to_[qk]\.", name) for name in model.adapters())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("[to_q,to_x]", "no layer's name ends in 'to_x'; did you mean"),
        ("[norm1]", "is not supported"),
        ("nothing.*", "not found in the base model"),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_a_dry_run(bench, pipeline_folder, target, words):
    settings = ("--dry-run", "--set", f"model.lora.target_modules={target}")
    for model in (pipeline_folder, "emoji"):
        status, text = bench("run", "draft_1", "--reward", "colorfulness", "--model", model, *settings)
        assert (status, words in " ".join(text.split())) == (2, True), text


def test_options_are_in_the_estimate(pipeline_folder):
    def trained(*settings: str) -> int:
        sets = ["train.micro_batch=1", "model.lora.rank=2", *settings]
        config = resolve(
            "prior", reward="colorfulness", overrides={"model.name": str(pipeline_folder)}, assignments=sets
        )
        return estimate_memory(config, torch.float32)["trained"] // 16

    for lora, settings in (
        (LoraConfig(rank=2), []),
        (OPTIONS["DoRA"], ["model.lora.use_dora=true"]),
        (OPTIONS["names"], ["model.lora.target_modules=[to_q,conv1,time_emb_proj]"]),
    ):
        model = pipeline_model(pipeline_folder, StableDiffusion, lora=lora)
        assert trained(*settings) == sum(p.numel() for p in model.adapters().values())


def test_an_adapter_with_other_options_is_refused(pipeline_folder, model, tmp_path):
    model.save(tmp_path)
    with pytest.raises(ValueError, match=r"other settings of model\.lora"):
        pipeline_model(pipeline_folder, lora=OPTIONS["DoRA"]).load(tmp_path)


def test_settings_of_earlier_versions_are_read(tmp_path: Path):
    """`model.lora_rank` and `model.lora_alpha` of rows and of a stored configuration."""
    config = resolve("prior", suite="sd35-hps")
    settings = comparable_settings(config)
    former = {key: value for key, value in settings.items() if not key.startswith("model.lora.")}
    former |= {"model.lora_rank": 32, "model.lora_alpha": 64}
    assert comparable_settings(from_settings(former, [])) == settings
    tree = config.model_dump(mode="json")
    tree["model"] = {k: v for k, v in tree["model"].items() if k != "lora"} | {"lora_rank": 32, "lora_alpha": 64}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    assert read(tmp_path / "config.yaml").hash() == config.hash()
    with pytest.raises(BenchError, match=r"did you mean 'model\.lora\.rank'"):
        resolve("prior", assignments=["model.lora_rank=4"])
