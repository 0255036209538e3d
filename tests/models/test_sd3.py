"""Stable Diffusion 3, on the embedded prior and on a small pipeline, with T5 and without."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from example_families import METHODS, SAMPLES, TINY, agree_from_prompts, loaded
from transformers import CLIPTokenizer

from bench.config import resolve
from bench.diagnose.selftest import models
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import BenchError
from bench.model import DiffusionModel
from bench.models.architecture import build
from bench.models.cards import CARDS
from bench.models.catalogue import load_model, make_kernel, repository
from bench.models.emoji import FLOW, WEIGHTS, shared
from bench.models.random_weights import TOKENIZERS, write
from bench.models.sd3 import StableDiffusion3
from bench.runs.estimate import blueprint
from bench.sampling.kernel import Kernel
from bench.sampling.noise import Noise, seeded
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

pytestmark = pytest.mark.usefixtures("undrawn")

DETERMINISTIC = SamplerConfig(steps=5, eta=0.0, final_noise=0.0, guidance=3.0)


@pytest.fixture
def model() -> StableDiffusion3:
    return load_model(ModelConfig(name="emoji_flow", lora=LoraConfig(rank=2)), DETERMINISTIC)


def plain() -> StableDiffusion3Pipeline:
    """diffusers alone."""
    pipe = StableDiffusion3Pipeline.from_pretrained(FLOW, torch_dtype=torch.float32, **shared(FLOW))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusion3Pipeline, model: StableDiffusion3) -> torch.Tensor:
    """Latents of SAMPLES by the pipeline's own call, from prompts."""
    return pipe(
        [prompt for prompt, _ in SAMPLES],
        num_inference_steps=DETERMINISTIC.steps,
        guidance_scale=model.guidance,
        latents=Noise(0, "evaluate", SAMPLES)(0, model.latent_shape),
        max_sequence_length=0,
        output_type="latent",
    ).images


def sample(model: StableDiffusion3, samples: list[tuple[str, int]] = SAMPLES) -> torch.Tensor:
    batch = Batch([prompt for prompt, _ in samples], samples, model.encode([prompt for prompt, _ in samples]))
    with torch.no_grad():
        path = rollout(model, make_kernel(model.spec, DETERMINISTIC), batch, Noise(0, "evaluate", samples))
    return path.latents[:, -1]


@torch.no_grad()
def test_sd3_equals_diffusers_to_the_bit(model):
    """Latents of a deterministic chain of an untrained adapter; the pipeline encodes the prompts itself, as a batch."""
    assert model.output == "flow"
    inputs = model.pipeline_inputs(model.encode([prompt for prompt, _ in SAMPLES]))
    pipe = plain()
    noise = Noise(0, "evaluate", SAMPLES)(0, model.latent_shape)
    theirs = pipe(**inputs, num_inference_steps=5, latents=noise, output_type="latent").images
    assert torch.equal(sample(model), theirs)
    torch.testing.assert_close(draw(pipe, model), theirs, rtol=1e-4, atol=1e-4)
    images = pipe(**inputs, num_inference_steps=5, latents=noise, output_type="pt").images
    torch.testing.assert_close(model.decode(theirs), images, rtol=0, atol=1e-6)


@torch.no_grad()
def test_sd3_adapter_in_diffusers(model, tmp_path):
    before = sample(model)
    perturb(model, 0.1)
    after = sample(model)
    assert (after - before).norm() > 0.01 * before.norm()
    model.save(tmp_path)
    pipe = plain()
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(pipe, model), after, rtol=1e-3, atol=1e-3)
    other = load_model(ModelConfig(name="emoji_flow", lora=LoraConfig(rank=2)), DETERMINISTIC, seed=1)
    other.load(tmp_path)
    assert torch.equal(sample(other), after)
    t, z = torch.tensor(900.0), Noise(0, "train", SAMPLES)(0, model.latent_shape)
    conditioning = model.encode([prompt for prompt, _ in SAMPLES])
    fresh = load_model(ModelConfig(name="emoji_flow", lora=LoraConfig(rank=2)), DETERMINISTIC)
    assert torch.equal(model.predict(z, t, conditioning, prior=True), fresh.predict(z, t, conditioning))


@pytest.mark.parametrize(
    "check",
    [
        models.neighbours_do_not_matter,
        models.checkpointing_leaves_gradients_unchanged,
        models.the_output_means_what_it_says,
    ],
    ids=lambda check: check.__name__,
)
def test_sd3_keeps_the_contract(check):
    check("emoji_flow")


class ReadAsFlow:
    """A noise-predicting prior on the flow's path, as far as a rollout asks: its own time where the ratio of noise to
    signal is the same, its input rescaled to unit variance."""

    def __init__(self, model: DiffusionModel, kernel: Kernel):
        self.model, self.kernel, self.latent_shape, self.device = model, kernel, model.latent_shape, model.device

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        s = t / 1000
        k = int((noise_over_signal(self.kernel)[:-1] - s / (1 - s)).abs().argmin())
        inside = z / ((1 - s) ** 2 + s**2) ** 0.5
        noise = self.model.predict(inside, self.kernel.timesteps[k], conditioning, prior=prior, guided=guided)
        return noise - self.kernel.clean(inside, noise, k)


def noise_over_signal(kernel: Kernel) -> torch.Tensor:
    return ((1 - kernel.alphas_cumprod) / kernel.alphas_cumprod) ** 0.5


@torch.no_grad()
def test_a_diffusion_prior_read_as_a_flow_is_the_same_prior():
    """The same clean predictions along the chain, and the same finished samples, at equal ratios of noise to signal."""
    model = load_model(ModelConfig(name="emoji", lora=LoraConfig(rank=2)), SamplerConfig(guidance=3.0))
    diffusion = make_kernel(model.spec, SamplerConfig(steps=6, eta=0.0))
    ratio = noise_over_signal(diffusion)
    sigmas = ratio / (1 + ratio)
    flow = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, 0.0, "ddim", "flow", sigmas)
    prompts = [prompt for prompt, _ in SAMPLES]
    batch = Batch(prompts, SAMPLES, model.encode(prompts))
    noise = Noise(0, "evaluate", SAMPLES)
    ours = rollout(model, diffusion, batch, noise, record=frozenset({"model_output"}))
    # the flow's path at its first level is shorter than a diffusion's by this factor
    size = ((1 - sigmas) ** 2 + sigmas**2) ** 0.5

    def scaled(step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return noise(step, shape) * size[0]

    theirs = rollout(ReadAsFlow(model, diffusion), flow, batch, scaled, record=frozenset({"model_output"}))
    for k in range(6):
        clean = diffusion.clean(ours.latents[:, k], ours.model_output[:, k], k)
        torch.testing.assert_close(
            flow.clean(theirs.latents[:, k], theirs.model_output[:, k], k), clean, rtol=0, atol=2e-3
        )
    torch.testing.assert_close(theirs.latents[:, -1] / size[-1], ours.latents[:, -1], rtol=0, atol=2e-3)


def test_t5_can_be_left_out(bench, untried, tmp_path, monkeypatch):
    """It is then not asked for either, in a named model or another repository; its text states are zeros."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write([repository("sd35_medium")], tmp_path, "tiny")
    whole, less = repository("sd35_medium"), repository("sd35_medium", t5=False)
    assert whole.size - less.size > 9e9
    folder = whole.path()
    shutil.rmtree(folder / "text_encoder_3")
    assert whole.missing() and not less.missing()
    for name in ("sd35_medium", repository("sd35_medium").name, str(folder)):
        model = loaded(name, t5=False)
        text = model.encode(["tiger"]).parts["text"]
        assert text.shape == (1, 77 + 256, 40) and not text[:, 77:].any() and text[:, :77].any()
    z = torch.zeros(1, *model.latent_shape)
    model.call_pipeline(model.open(), model.encode(["tiger"]), z, models._kernel(model, 2), "latent")
    status, text = bench("run", "--method", "ddpo", "--suite", "sd35-hps", "--set", "model.t5=false", "--dry-run")
    assert status == 0, text
    assert "CLIP alone reads a prompt" in text
    with pytest.raises(BenchError, match="has no T5 encoder"):
        load_model(ModelConfig(name="emoji", t5=False), SamplerConfig())


@pytest.mark.parametrize("method", METHODS)
def test_methods_end_to_end_on_the_flow_prior(bench, tmp_path, monkeypatch, method):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = [word for setting in TINY for word in ("--set", setting)]
    out = tmp_path / "run"
    status, text = bench("run", "--method", method, "--model", "emoji_flow", "--updates", 1, "--out", out, *sets)
    assert status == 0, text
    rows = pd.read_parquet(out / "rows.parquet").set_index("metric")
    assert rows.loc["path_kl", "value"] > 0
    assert set(rows["model"]) == {"emoji_flow"}


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory) -> Path:
    """A small Stable Diffusion 3 whose text, T5's too, is no wider than the states of both CLIP encoders."""
    changes = {"transformer": {"joint_attention_dim": 32}, "text_encoder_3": {"d_model": 32}}
    folder, networks = tmp_path_factory.mktemp("narrow"), CARDS["sd35_medium"].architecture.networks.items()
    clip = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=77)
    with seeded(0, "narrow"):
        parts = {name: build(network.kind, network.tiny | changes.get(name, {})) for name, network in networks}
    scheduler, t5 = FlowMatchEulerDiscreteScheduler(shift=3.0), TOKENIZERS["T5EncoderModel"](folder, "tiny")
    parts |= {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5, "scheduler": scheduler}
    StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_t5_is_used_where_the_pipeline_has_it_whatever_the_widths(narrow_folder):
    for t5 in (True, False):
        model = loaded(str(narrow_folder), t5=t5)
        text = model.encode(["tiger"]).parts["text"]
        assert text.shape == (1, *model.spec.conditioning["text"]) == (1, 77 + 256, 32)
        assert bool(text[:, 77:].any()) is t5
        agree_from_prompts(model)
        settings = {"model.name": str(narrow_folder), "model.t5": t5}
        pipeline = blueprint(resolve("ddpo", reward="colorfulness", overrides=settings))
        assert pipeline.spec.conditioning == model.spec.conditioning
        assert ("text_encoder_3" in pipeline.networks) is t5


def dry_run(bench, folder: Path) -> tuple[int, str]:
    options = ("--reward", "colorfulness", "--set", "sampler.spacing=auto", "--dry-run")
    status, text = bench("run", "ddpo", "--model", folder, *options)
    return status, " ".join(text.split())


@pytest.mark.parametrize(
    ("left_out", "status", "words"),
    [
        (["tokenizer_3"], 2, "names text_encoder_3 and no tokenizer_3"),
        (["text_encoder_3"], 0, "estimated memory"),
        (["text_encoder_3", "tokenizer_3"], 0, "estimated memory"),
    ],
)
def test_parts_are_those_that_the_index_names(bench, untried, narrow_folder, tmp_path, left_out, status, words):
    """A folder of a part that lies there unnamed is not read; an encoder without its tokenizer is refused."""
    folder = shutil.copytree(narrow_folder, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: [None, None] for part in left_out}))
    found, text = dry_run(bench, folder)
    assert (found, words in text) == (status, True), text
    if len(left_out) == 2:
        model = loaded(str(folder))
        assert model.encode(["tiger"]).parts["text"].shape == (1, *model.spec.conditioning["text"]) == (1, 77, 32)


@pytest.mark.parametrize(("part", "key"), [("text_encoder_3", "d_model"), ("text_encoder", "hidden_size")])
def test_text_that_the_transformer_cannot_hold_is_refused_by_a_dry_run(
    bench, untried, narrow_folder, tmp_path, part, key
):
    folder = shutil.copytree(narrow_folder, tmp_path / "copy")
    network = CARDS["sd35_medium"].architecture.networks[part]
    build(network.kind, network.tiny | {key: 40}).save_pretrained(folder / part)
    status, text = dry_run(bench, folder)
    assert status == 2 and "joint_attention_dim = 32" in text, text
