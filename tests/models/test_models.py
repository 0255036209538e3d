"""Models: precision, full finetuning, storage."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDIMScheduler
from scaffold import pipeline_model

from bench.config import resolve
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import BenchError
from bench.hub import RANDOM
from bench.model import DiffusionModel
from bench.models.catalogue import load_model, locate, make_kernel
from bench.models.lora import LORA_FILE
from bench.models.precision import network_dtype, use_precision
from bench.models.stable_diffusion import StableDiffusion
from bench.runs.estimate import estimate_memory, with_batches
from bench.runtime import memory
from bench.runtime.meter import Meter
from bench.sampling.noise import Noise
from bench.settings import ModelConfig, SamplerConfig, TrainConfig

NAMES = [("cat", 0), ("dog", 0)]


def predict(model: StableDiffusion, **options: bool) -> torch.Tensor:
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
    for own in (model, model.with_guidance(1.0)):  # both predictions of one call, and of the class's own two calls
        expected = (guided if own is model else text), text
        torch.testing.assert_close(own.predict_both(z, t, model.encode(["cat", "dog"])), expected, rtol=0, atol=1e-5)
        found = DiffusionModel.predict_both(own, z, t, model.encode(["cat", "dog"]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_another_guidance_shares_the_adapters(model):
    other = model.with_guidance(2.0)
    assert other.fingerprint() != model.fingerprint() == other.with_guidance(3.0).fingerprint()
    for parameter in other.adapters().values():
        parameter.data += 0.1
    text, null = predict(model, guided=False), predict(model.with_guidance(1.0))
    assert torch.equal(text, null)
    torch.testing.assert_close((predict(model) - text) / 2, predict(other) - text, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_the_prior_stays_what_it_was(pipeline_folder, finetune):
    model = pipeline_model(pipeline_folder, finetune=finetune)
    before = predict(model)
    assert torch.equal(before, predict(model, prior=True))
    perturb(model, 0.1)
    assert torch.equal(before, predict(model, prior=True))
    assert not torch.allclose(before, predict(model), atol=1e-3)
    assert all(p.requires_grad for p in model.adapters().values())  # switching off must not clear it


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_save_and_load(pipeline_folder, finetune, tmp_path):
    model = pipeline_model(pipeline_folder, finetune=finetune)
    perturb(model, 0.1)
    model.save(tmp_path)
    fresh = pipeline_model(pipeline_folder, finetune=finetune, seed=1)
    assert not torch.equal(predict(fresh), predict(model))
    fresh.load(tmp_path)
    assert torch.equal(predict(fresh), predict(model))


def test_an_adapter_of_another_rank_is_refused(pipeline_folder, model, tmp_path):
    model.save(tmp_path)
    with pytest.raises(ValueError, match=LORA_FILE):
        pipeline_model(pipeline_folder, rank=4).load(tmp_path)


def test_low_precision_network_keeps_float32_adapters_and_latents(pipeline_folder, model):
    low = pipeline_model(pipeline_folder, dtype="bfloat16")
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


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_is_that_of_diffusers_to_the_bit(pipeline_folder, tmp_path, model, zero_snr):
    """Also where the schedule starts without any signal, `ᾱ = 0`, and the clean latent is `−v`."""
    folder = tmp_path / "v"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    other = pipeline_model(folder)
    assert other.output == "v_prediction"
    assert torch.equal(predict(other), predict(model))  # the same weights, and a network's own output
    assert other.fingerprint() != model.fingerprint()
    kernel = make_kernel(other.spec, SamplerConfig(steps=5, eta=1.0, spacing="trailing"))
    scheduler = DDIMScheduler.from_config(other.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    z, output, noise = (Noise(0, "train", NAMES)(k, model.latent_shape) for k in range(3))
    assert (float(kernel.alphas_cumprod[0]) < 1e-7) is zero_snr
    for k, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, t, z, eta=1.0, variance_noise=noise)
        assert torch.equal(kernel.clean(z, output, k), theirs.pred_original_sample)
        assert torch.equal(kernel.mean(z, output, k) + kernel.std(k, z) * noise, theirs.prev_sample)
        assert bool(theirs.prev_sample.isfinite().all())


def test_noise_prediction_without_any_signal_is_refused(pipeline_folder, tmp_path):
    folder = tmp_path / "zero"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    other = pipeline_model(folder)
    with pytest.raises(BenchError, match="zero terminal SNR"):
        make_kernel(other.spec, SamplerConfig(steps=5, spacing="trailing"))


def test_weights_depend_on_the_seed_alone(pipeline_folder, model):
    state = torch.get_rng_state()
    same = pipeline_model(pipeline_folder)
    other = pipeline_model(pipeline_folder, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    ours = model.adapters()
    assert all(torch.equal(ours[name], p) for name, p in same.adapters().items())
    assert any(not torch.equal(ours[name], p) for name, p in other.adapters().items())


@pytest.mark.parametrize("attention", ["eager", "sliced"])
def test_attention_variants_give_the_same_prediction_and_gradient(pipeline_folder, model, attention):
    other = pipeline_model(pipeline_folder, attention=attention)
    kinds = {type(processor).__name__ for processor in other.network.attn_processors.values()}
    assert kinds == {"AttnProcessor" if attention == "eager" else "SlicedAttnProcessor"}
    outputs = []
    for one in (model, other):
        perturb(one, 0.1)
        output = predict(one)
        output.square().sum().backward()
        outputs.append((output, [p.grad for p in one.adapters().values()]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_slicing_and_recomputing_the_decoder_change_nothing(pipeline_folder, model):
    z = Noise(0, "train", NAMES)(0, model.latent_shape).requires_grad_()
    images = model.decode(z)
    weights = torch.linspace(0, 1, images.numel()).view_as(images)
    (expected,) = torch.autograd.grad((images * weights).sum(), z)
    for options in ({"vae_slicing": True}, {"checkpointing": True}):
        other = pipeline_model(pipeline_folder, **options)
        assert other.pipeline.vae.use_slicing is options.get("vae_slicing", False)
        found = other.decode(z)
        torch.testing.assert_close(found, images, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad((found * weights).sum(), z)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_denoiser(pipeline_folder, model):
    half = pipeline_model(pipeline_folder, dtype="float16")
    output = predict(half)
    assert output.dtype == torch.float32
    assert float((output - predict(model)).abs().max()) < 0.02 * float(output.abs().max())
    assert {p.dtype for p in half.adapters().values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_denoiser_gives_the_same_and_is_counted(pipeline_folder, model):
    compiled = pipeline_model(pipeline_folder, compile=True)
    meter = Meter()
    meter.watch(compiled.network)
    for one in (model, compiled):
        perturb(one, 0.1)
    for prior in (False, True, False):
        torch.testing.assert_close(predict(compiled, prior=prior), predict(model, prior=prior), rtol=1e-4, atol=1e-5)
    predict(compiled).square().sum().backward()
    predict(model).square().sum().backward()
    for name, parameter in model.adapters().items():
        torch.testing.assert_close(compiled.adapters()[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    assert (meter.network_forwards, meter.network_backwards) == (16, 4)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_stable_diffusion_by_name(hub, name):
    """Through the cache's layout, PNDM's or a v-prediction scheduler config included."""
    assert locate(name).name == RANDOM["tiny"]
    config = resolve("prior", reward="colorfulness", overrides={"model.name": name})
    model = load_model(config.model, config.sampler)
    assert model.spec.alphas_cumprod.shape == (1000,)
    assert model.spec.final_alpha < 1
    assert model.spec.steps_offset == 1
    assert float(model.spec.alphas_cumprod[-1]) == pytest.approx(0.0047, abs=1e-4)  # of Stable Diffusion's schedule
    assert model.output == ("v_prediction" if name == "sd21" else "epsilon")
    output = predict(model)
    assert output.shape == (2, 4, 8, 8)
    assert model.decode(output).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "family",
    ["sd15", "sdxl", "sd35_medium", "flux_dev", "flux_schnell", "flux2_klein", "z-image-turbo", "sana-600m"],
    indirect=True,
)
def test_estimated_memory_is_what_autograd_keeps(family):
    """The count without storage against the real forward pass, and the parts that follow from the configuration."""
    settings = ["model.checkpointing=false", "train.micro_batch=1", "sampler.spacing=auto"]
    settings += ["sampler.guidance=1"] if family == "flux_schnell" else []
    config = resolve("nabla_gfn", reward="hps", overrides={"model.name": family}, assignments=settings)
    estimate = estimate_memory(config, torch.float32)
    model = load_model(config.model, config.sampler)
    own = {p.data_ptr() for p in model.network.parameters()} | {p.data_ptr() for p in model.pipeline.vae.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    z = Noise(0, "train", NAMES[:1])(0, model.latent_shape).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        eps = model.predict(z, torch.tensor(500), model.encode(["cat" * 400]))  # as long as texts can be
        image = model.decode(z)
    assert eps.requires_grad and image.requires_grad
    assert sum(kept.values()) == pytest.approx(estimate["backward"], rel=0.1)
    trained = sum(p.numel() for p in model.adapters().values())
    assert estimate["trained"] == trained * 16
    assert estimate["round"] == 64 * 51 * math.prod(model.latent_shape) * 4 * 2


@pytest.mark.parametrize("gib", [24, 40, 80, 140, 1000])
def test_batches_left_open_are_the_largest_that_fit(monkeypatch, gib):
    monkeypatch.setattr(memory, "available", lambda device: (0, gib * 2**30))
    gpu = torch.device("cuda")

    def chosen(*settings: str) -> TrainConfig:
        return with_batches(resolve("nabla_gfn", suite="sd15-hps", assignments=list(settings)), gpu).train

    def share(rows: int) -> float:
        config = resolve("nabla_gfn", suite="sd15-hps", overrides={"train.micro_batch": rows})
        return sum(estimate_memory(config, torch.bfloat16).values()) / (gib * 2**30)

    rows = chosen().micro_batch
    assert rows == 1 or share(rows) <= 0.8
    assert rows == 64 or share(2 * rows) > 0.8
    assert chosen().sample_batch == min(64, 2 * rows)
    assert chosen("train.micro_batch=3").sample_batch == 6
    assert chosen("train.sample_batch=5").micro_batch == rows
    eight = with_batches(resolve("nabla_gfn", suite="sd15-hps"), gpu, processes=8).train  # 64 trajectories, two updates
    assert (eight.micro_batch, eight.sample_batch) == (min(rows, 4), min(2 * rows, 8))


def test_a_model_that_ships_is_float32_on_a_gpu_too():
    found = {name: network_dtype(ModelConfig(name=name), "cuda") for name in ("emoji", "emoji_flow", "ring", "sd15")}
    assert found.pop("sd15") == torch.bfloat16
    assert set(found.values()) == {torch.float32}
    assert network_dtype(ModelConfig(name="emoji", dtype="bfloat16"), "cpu") == torch.bfloat16
    assert network_dtype(ModelConfig(name="sd15"), "cpu") == torch.float32


@pytest.fixture
def flags() -> Iterator[tuple]:
    """torch's two switches of TF32, as they were after the test."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize(
    ("name", "dtype", "rounded"),
    [("emoji", "auto", False), ("emoji", "tf32", True), ("sd15", "auto", True), ("sd15", "float32", False)],
)
def test_products_are_rounded_beside_16_bits_or_on_request(flags, name, dtype, rounded):
    for flag in flags:
        flag.allow_tf32 = not rounded
    use_precision(ModelConfig(name=name, dtype=dtype), "cuda")
    assert [flag.allow_tf32 for flag in flags] == [rounded, rounded]


def test_tf32_is_a_prior_of_its_own(pipeline_folder):
    """Of the same weights: its numbers on a GPU are others, so neither tables nor stored samples may mix them."""
    names = ("float32", "tf32", "bfloat16")
    kinds = [ModelConfig(name=str(pipeline_folder), dtype=dtype) for dtype in names]
    models = [load_model(kind, SamplerConfig(guidance=3.0)) for kind in kinds]
    assert len({model.fingerprint() for model in models}) == 3
    assert torch.equal(predict(models[0]), predict(models[1]))


def test_nothing_is_estimated_for_an_analytic_model():
    assert estimate_memory(resolve("rtb", overrides={"model.name": "ring"}), torch.float32) is None


def test_merged_adapters_predict_the_same_and_are_put_back(model):
    perturb(model)
    z, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([981, 500, 1])
    text = model.encode(["cat", "dog", "fish"])
    weights = {name: value.clone() for name, value in model.network.state_dict().items()}

    def vjp(block):
        x = z.clone().requires_grad_()
        with block:
            output = model.predict(x, t, text)
        return output.detach(), torch.autograd.grad(output.sum(), x)[0]  # the graph outlives the block

    apart, merged = vjp(nullcontext()), vjp(model.merged())
    prior = model.predict(z, t, text, prior=True)
    with model.merged():
        assert torch.equal(model.predict(z, t, text, prior=True), prior)
        with model.merged():
            pass
        inside = model.predict(z, t, text)
    assert torch.equal(inside, merged[0])
    assert not torch.equal(inside, apart[0])  # so a merged network did run, in the outer block too
    for ours, theirs in zip(merged, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.predict(z, t, text), apart[0])
    assert all(torch.equal(value, weights[name]) for name, value in model.network.state_dict().items())


def test_16_bit_denoisers_are_not_merged(pipeline_folder):
    model = pipeline_model(pipeline_folder, dtype="bfloat16")
    perturb(model)
    z, t, text = torch.ones(2, 4, 8, 8), torch.tensor([500, 500]), model.encode(["cat", "dog"])
    apart = model.predict(z, t, text)
    with model.merged():
        assert torch.equal(model.predict(z, t, text), apart)
