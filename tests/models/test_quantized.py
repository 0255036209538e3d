"""`model.quantize`: a smaller frozen denoiser under the same adapter."""

from pathlib import Path

import pytest
import torch
from scaffold import PROMPTS, pipeline_model, trained
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bench.config import resolve
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import BenchError
from bench.models.pipeline import PipelineModel
from bench.models.quantized import BYTES, QuantizedLinear, quantizable, quantize

pytestmark = pytest.mark.usefixtures("undrawn")

KINDS = ["int8", "nf4"]


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of those that it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.itemsize


def predicted(model: PipelineModel, **options: bool) -> torch.Tensor:
    z = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(z, torch.tensor(500.0), model.encode(PROMPTS), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_smaller_and_its_product_and_gradient_are_those_of_its_weights(
    kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 192).to(dtype).requires_grad_(False)
    full, bias = layer.weight.clone(), layer.bias.clone()
    quantize(layer, kind, torch.device("cpu"))
    assert isinstance(layer, QuantizedLinear)
    assert size(layer.weight) < 1.04 * BYTES[kind] * full.numel() + 64 * 4
    weight = layer(torch.eye(256, dtype=dtype)).T - bias[:, None]
    largest = full.abs().amax(1, keepdim=True)  # the widest gaps are 1/127 and 0.304 of it
    bound = largest * ({"int8": 1 / 127, "nf4": 0.304}[kind] / 2 * 1.05 + 2 * torch.finfo(dtype).eps)
    assert bool(((weight - full).abs() <= bound).all())
    x = torch.randn(5, 256, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(x)
    assert sum(map(size, kept)) == 0  # beside the quantised weight, which is there anyway
    output.sum().backward()
    torch.testing.assert_close(
        x.grad, weight.sum(0).expand(5, -1), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_pipeline_is_another_prior_under_the_same_adapter(
    pipeline_folder: Path, tmp_path: Path, kind: str
) -> None:
    plain, model = pipeline_model(pipeline_folder), pipeline_model(pipeline_folder, quantize=kind)
    assert (
        len(
            {
                plain.fingerprint(),
                model.fingerprint(),
                pipeline_model(pipeline_folder, quantize=KINDS[kind == "int8"]).fingerprint(),
            }
        )
        == 3
    )
    layers = sum(isinstance(layer, QuantizedLinear) for layer in model.network.modules())
    assert layers == len(list(quantizable(plain.network))) > 10
    assert sum(map(size, model.network.parameters())) < sum(map(size, plain.network.parameters()))
    assert {name: p.dtype for name, p in model.adapters().items()} == {
        name: p.dtype for name, p in plain.adapters().items()
    }
    assert all(torch.equal(p, plain.adapters()[name]) for name, p in model.adapters().items())
    prior = predicted(model, prior=True).detach()
    distance = (prior - predicted(plain).detach()).norm() / prior.norm()
    assert 0 < distance < {"int8": 0.02, "nf4": 0.3}[kind]
    perturb(model, 0.1)
    assert torch.equal(predicted(model, prior=True), prior)
    output = predicted(model)
    output.square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.adapters().values())
    with model.merged():
        assert torch.equal(predicted(model), output)
    model.save(tmp_path)
    plain.load(tmp_path)
    assert all(torch.equal(p, plain.adapters()[name]) for name, p in model.adapters().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_to_the_bit(pipeline_folder: Path, tmp_path: Path, kind: str) -> None:
    straight = trained(pipeline_model(pipeline_folder, quantize=kind), tmp_path)
    *_, last = sorted((tmp_path / "checkpoints").iterdir())
    last.unlink()
    resumed = trained(pipeline_model(pipeline_folder, quantize=kind), tmp_path)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    full = trained(pipeline_model(pipeline_folder), tmp_path / "full")
    assert any(not torch.equal(full[name], tensor) for name, tensor in straight.items())


def test_a_run_exports_the_weights_in_full(tiny_run, bench, pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tiny_run("draft_1", "--set", "model.quantize=nf4", updates=1)
    assert "come from weights in nf4" in (folder / "adapter" / "README.md").read_text()
    status, text = bench("export", folder, "--out", tmp_path / "out")
    assert status == 0, text
    merged, full = pipeline_model(tmp_path / "out" / "merged"), pipeline_model(pipeline_folder, rank=8)
    full.load(folder / "adapter")
    torch.testing.assert_close(predicted(merged), predicted(full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["model.finetune=full", "model.lora.use_dora=true"])
def test_what_is_trained_is_not_quantised(other: str) -> None:
    with pytest.raises(BenchError, match=rf"model.quantize = int8.*leave out {other.replace('=', ' = ')}"):
        resolve("ddpo", assignments=["model.quantize=int8", other])


def test_a_model_of_points_has_nothing_to_quantise(bench) -> None:
    status, text = bench("run", "ddpo", "--model", "ring", "--dry-run", "--set", "model.quantize=int8")
    assert (status, "Traceback" in text) == (2, False)
    assert "model.quantize: 'ring' has no weights to quantise; leave it out." in text


def test_a_missing_package_is_named(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.models.quantized.find_spec", lambda name: None)
    status, text = bench("run", "ddpo", "--dry-run", "--set", "model.quantize=int8")
    assert (status, "Traceback" in text) == (2, False)
    assert "pip install 'nabla-bench[quantize]'" in text
