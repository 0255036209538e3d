"""Models: precision, full finetuning, storage."""

import pytest
import torch
from conftest import perturb

from bench.models.pipeline import LORA_FILE, LatentDiffusion
from bench.noise import Noise

NAMES = [("cat", 0), ("dog", 0)]


def predict(model: LatentDiffusion, **options: bool) -> torch.Tensor:
    z = Noise(0, "train", NAMES)(0, model.latent_shape)
    return model.predict(z, torch.tensor([500, 20]), model.encode([prompt for prompt, _ in NAMES]), **options)


def test_guidance_combines_two_unguided_predictions(model):
    z = Noise(0, "train", NAMES)(0, model.latent_shape)
    t = torch.tensor(500)
    text = model.predict(z, t, model.encode(["cat", "dog"]), guided=False)
    null = model.predict(z, t, model.encode(["", ""]), guided=False)
    guided = model.predict(z, t, model.encode(["cat", "dog"]))
    assert torch.allclose(guided, null + 3.0 * (text - null), atol=1e-5)
    assert not torch.allclose(guided, text, atol=1e-3)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_the_prior_stays_what_it_was(pipeline_folder, finetune):
    model = LatentDiffusion(pipeline_folder, guidance=3.0, finetune=finetune, lora_rank=2)
    before = predict(model)
    assert torch.equal(before, predict(model, prior=True))
    perturb(model, 0.1)
    assert torch.equal(before, predict(model, prior=True))
    assert not torch.allclose(before, predict(model), atol=1e-3)
    assert all(p.requires_grad for p in model.adapters().values())  # switching off must not clear it


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_save_and_load(pipeline_folder, finetune, tmp_path):
    model = LatentDiffusion(pipeline_folder, guidance=3.0, finetune=finetune, lora_rank=2)
    perturb(model, 0.1)
    model.save(tmp_path)
    fresh = LatentDiffusion(pipeline_folder, guidance=3.0, finetune=finetune, lora_rank=2, seed=1)
    assert not torch.equal(predict(fresh), predict(model))
    fresh.load(tmp_path)
    assert torch.equal(predict(fresh), predict(model))


def test_an_adapter_of_another_rank_is_refused(pipeline_folder, model, tmp_path):
    model.save(tmp_path)
    with pytest.raises(ValueError, match=LORA_FILE):
        LatentDiffusion(pipeline_folder, guidance=3.0, lora_rank=4).load(tmp_path)


def test_low_precision_network_keeps_float32_adapters_and_latents(pipeline_folder, model):
    low = LatentDiffusion(pipeline_folder, guidance=3.0, lora_rank=2, dtype=torch.bfloat16)
    output = predict(low)
    assert output.dtype == torch.float32
    assert next(low.network.conv_in.parameters()).dtype == torch.bfloat16
    error = (output - predict(model)).abs().mean() / output.abs().mean()
    assert 0 < error < 0.05
    perturb(low, 0.1)
    predict(low).square().sum().backward()
    for parameter in low.adapters().values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert bool((parameter.grad != 0).any())
    assert low.decode(Noise(0, "train", NAMES)(0, low.latent_shape)).dtype == torch.float32


def test_v_prediction_is_turned_into_noise(pipeline_folder, tmp_path, model):
    import json
    import shutil

    folder = tmp_path / "v"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    other = LatentDiffusion(folder, guidance=3.0, lora_rank=2)
    z = Noise(0, "train", NAMES)(0, model.latent_shape)
    alpha = model.alphas_cumprod[torch.tensor([500, 20])].view(-1, 1, 1, 1)
    raw = predict(model)  # the same weights, read as ε
    assert torch.allclose(predict(other), alpha**0.5 * raw + (1 - alpha) ** 0.5 * z, atol=1e-5)
    assert other.fingerprint() != model.fingerprint()


def test_weights_depend_on_the_seed_alone(pipeline_folder, model):
    state = torch.get_rng_state()
    same = LatentDiffusion(pipeline_folder, guidance=3.0, lora_rank=2)
    other = LatentDiffusion(pipeline_folder, guidance=3.0, lora_rank=2, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    ours = model.adapters()
    assert all(torch.equal(ours[name], p) for name, p in same.adapters().items())
    assert any(not torch.equal(ours[name], p) for name, p in other.adapters().items())
