"""Families of pipelines: each agrees with diffusers' own call. Stable Diffusion 3's is tested on the embedded prior."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from bench.config import resolve
from bench.core import Core
from bench.diagnose.selftest import models
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import BenchError
from bench.evaluation import evaluator
from bench.model import Conditioning, DiffusionModel
from bench.models.architecture import build
from bench.models.cards import CARDS
from bench.models.catalogue import load_model, make_kernel, repository
from bench.models.emoji import FLOW, WEIGHTS, shared
from bench.models.export import export_layouts
from bench.models.lora import add_lora
from bench.models.pipeline import PipelineModel
from bench.models.random_weights import TOKENIZERS, write
from bench.models.sana import INSTRUCTION
from bench.models.sd3 import StableDiffusion3
from bench.models.sdxl import StableDiffusionXL
from bench.runs.adapter import redraw
from bench.runs.estimate import blueprint
from bench.sampling.grids import flow_kernel
from bench.sampling.kernel import Kernel
from bench.sampling.noise import Noise, seeded
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

TEXT = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
SAMPLES = [("tiger", 0), ("tiger", 1), ("noto fox", 0)]
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


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    """A random `StableDiffusionXLPipeline`, small, in the real layout."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id} | TEXT
    words |= {"eos_token_id": tokenizer.eos_token_id, "projection_dim": 12}
    folder = tmp_path_factory.mktemp("sdxl")
    with seeded(0, "sdxl"):
        unet = UNet2DConditionModel(
            sample_size=(8, 16),
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        )
        vae = AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
        encoders = (CLIPTextModel(CLIPTextConfig(hidden_size=8, **words)),
                    CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, **words)))  # fmt: skip
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**levels, steps_offset=1, timestep_spacing="leading")
    StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler).save_pretrained(folder)
    return folder


def sdxl(folder) -> StableDiffusionXL:
    return load_model(ModelConfig(name=str(folder), lora=LoraConfig(rank=2)), SamplerConfig(guidance=3.0))


@torch.no_grad()
def test_sdxl_equals_diffusers_to_the_bit(sdxl_folder, tmp_path):
    """A picture that is not square, prompts without and with text; then with a trained adapter, loaded by diffusers."""
    model = sdxl(sdxl_folder)
    assert model.latent_shape == (4, 8, 16)
    noise = Noise(0, "evaluate", SAMPLES)(0, model.latent_shape)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    size = {"height": 8 * pipe.vae_scale_factor, "width": 16 * pipe.vae_scale_factor}
    prompts = [prompt for prompt, _ in SAMPLES]
    kernel = make_kernel(model.spec, SamplerConfig(steps=5, eta=0.0))

    def ours() -> torch.Tensor:
        batch = Batch(prompts, SAMPLES, model.encode(prompts))
        return rollout(model, kernel, batch, Noise(0, "evaluate", SAMPLES)).latents[:, -1]

    theirs = pipe(**model.pipeline_inputs(model.encode(prompts)) | settings | size).images
    assert torch.equal(ours(), theirs)
    torch.testing.assert_close(pipe(prompts, **settings, **size).images, theirs, rtol=1e-4, atol=1e-4)
    perturb(model, 0.1)
    assert (ours() - theirs).norm() > 0.01 * theirs.norm()
    model.save(tmp_path)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipe(prompts, **settings, **size).images, ours(), rtol=1e-3, atol=1e-3)


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


METHODS = ["nabla_gfn", "ddpo", "draft_1", "adjoint_matching"]
VIDEO = "wan2.1-t2v-1.3b"
NEWER = ["z-image-turbo", "qwen-image", "sana-600m", VIDEO]
FAMILIES = ["sdxl", "sd35_medium", "flux_dev", "flux_schnell", "flux2_klein", *NEWER]
SMALL = {"qwen-image": {"size": [64, 96]}, VIDEO: {"size": [64, 96], "frames": 5}}  # where no file says a size
TINY = [
    "prompts.limit=2", "train.prompts_per_round=2", "train.samples_per_prompt=2", "train.updates_per_round=1",
    "sampler.steps=3", "evaluation.train_prompts=2", "evaluation.test_prompts=0", "evaluation.validation_prompts=0",
    "evaluation.samples_per_prompt=2",
    "evaluation.metrics=[reward,path_kl]", "evaluation.rewards=[]",
]  # fmt: skip


def guidance(name: str) -> float:
    return 1.0 if name == "flux_schnell" else 3.0


def loaded(name: str, alpha: int | None = None, **options) -> PipelineModel:
    lora = LoraConfig(rank=2, alpha=alpha)
    config = ModelConfig(name=name, lora=lora, **SMALL.get(name, {}) | options)
    return load_model(config, SamplerConfig(guidance=guidance(name)))


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_family_equals_diffusers_to_the_bit(family):
    """Images of the pipeline's own call, also with an adapter that it loads; then where it reads the prompts itself."""
    models.its_pipeline_agrees(family)
    model = loaded(family, alpha=4)
    agree_from_prompts(model, **{"negative_prompt": [""] * 3} if family == "qwen-image" else {})  # none: no guidance
    if "negative_prompt" in inspect.signature(model.pipeline.__call__).parameters and model.rows(2) == 2:
        agree_from_prompts(loaded(family, negative_prompt="a fox").with_guidance(2.0), negative_prompt=["a fox"] * 3)


@pytest.mark.parametrize("family", ["sdxl", "emoji_flow"], indirect=True)
@torch.no_grad()
def test_an_exported_pipeline_is_the_finetuned_model(family, tmp_path):
    """Read by the line that the card shows."""
    model = loaded(family, alpha=4)
    perturb(model, 0.1)
    z, t, tiger = Noise(0, "train", SAMPLES[:1])(0, model.latent_shape), torch.tensor(500), model.encode(["tiger"])
    expected, prior = (model.predict(z, t, tiger, prior=prior) for prior in (False, True))
    assert (expected - prior).norm() > 0.01 * expected.norm()
    line = export_layouts(model, tmp_path)["merged"].replace('"merged"', f'"{tmp_path / "merged"}"')
    space = vars(diffusers).copy()
    exec(line, space)
    model.network.load_state_dict(getattr(space["pipe"], model.denoiser).state_dict())
    assert not model.adapters()
    torch.testing.assert_close(model.predict(z, t, tiger), expected, rtol=1e-4, atol=1e-4)


def agree_from_prompts(model: PipelineModel, **inputs: list[str]) -> None:
    """Our images are those of the pipeline's own call that reads the prompts."""
    kernel, noise = models._kernel(model, 3), Noise(0, "evaluate", SAMPLES)
    prompts = [prompt for prompt, _ in SAMPLES]
    ours = model.decode(rollout(model, kernel, Batch(prompts, SAMPLES, model.encode(prompts)), noise).latents[:, -1])
    guidance = model.call_guidance(model.guidance)
    model.pipeline_inputs = lambda conditioning: {"prompt": prompts, **guidance, **inputs}
    theirs = model.call_pipeline(model.open(), model.encode(prompts), noise(0, model.latent_shape), kernel, "pt")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)


def test_alpha_is_in_the_stored_adapter(pipeline_folder, tmp_path):
    """A scale of alpha over rank other than 1: in diffusers, and read again."""
    model, plain = (
        load_model(ModelConfig(name=str(pipeline_folder), lora=LoraConfig(rank=2, alpha=alpha)), SamplerConfig())
        for alpha in (8, 2)
    )
    perturb(model, 0.1)
    model.save(tmp_path)
    for reader in (model, plain):
        reader.load(tmp_path)
    z, t = Noise(0, "train", SAMPLES)(0, model.latent_shape), torch.tensor(500)
    outputs = [one.predict(z, t, one.encode(["tiger"] * 3)) for one in (model, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_t5_can_be_left_out(bench, tmp_path, monkeypatch):
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


def test_a_negative_prompt_needs_guidance(bench, hub):
    for model, settings, words in (
        ("emoji", ["sampler.guidance=1"], "does nothing without guidance"),
        ("ring", ["sampler.guidance=2"], "no guidance of 'ring'"),
        ("flux_dev", [], "no guidance of 'flux_dev'"),
    ):
        if model == "flux_dev":
            write([repository("flux_dev")], hub, "tiny")
        sets = [word for setting in (*settings, "model.negative_prompt=dull") for word in ("--set", setting)]
        status, text = bench("run", "draft_1", "--model", model, "--dry-run", *sets)
        assert (status, words in " ".join(text.split())) == (2, True), text


@pytest.mark.parametrize(
    ("method", "model", "words"),
    [
        ("ddpo", "emoji", "very predictions of its rollouts"),
        ("draft_1", "emoji", "very predictions of its rollouts"),
        ("nft", "ring", "knows no guidance"),
        ("nft", "emoji", ""),
    ],
)
def test_losses_with_another_guidance_are_refused_where_they_mean_nothing(bench, untried, method, model, words):
    status, text = bench("run", method, "--model", model, "--dry-run", "--set", "train.guidance=2")
    assert status == (2 if words else 0), text
    assert words in " ".join(text.split())


def test_a_distilled_model_has_no_guidance(hub):
    write([repository("flux_schnell")], hub, "tiny")
    with pytest.raises(BenchError, match=r"use sampler\.guidance=1"):
        load_model(ModelConfig(name="flux_schnell"), SamplerConfig(guidance=3.0))


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


SHORT = {("sdxl", "nabla_gfn"), ("sd35_medium", "ddpo"), ("flux_dev", "draft_1"), ("flux2_klein", "adjoint_matching"),
         ("z-image-turbo", "adjoint_matching"), (VIDEO, "nabla_gfn")}  # fmt: skip


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


@torch.no_grad()
@pytest.mark.parametrize("family", [VIDEO], indirect=True)
def test_one_frame_is_a_picture_and_several_are_a_video(family):
    """To the bit those of the pipeline's own call; the latents too, and those of a size that is not square."""
    prints = set()
    for frames, latents in ((1, (4, 1, 8, 12)), (5, (4, 2, 8, 12))):
        model = loaded(family, frames=frames).with_guidance(1.0)
        assert model.latent_shape == latents
        prints.add(model.fingerprint())
        kernel, noise = models._kernel(model, 3), Noise(0, "evaluate", SAMPLES)
        prompts, z = [prompt for prompt, _ in SAMPLES], noise(0, model.latent_shape)
        ours = rollout(model, kernel, Batch(prompts, SAMPLES, model.encode(prompts)), noise).latents[:, -1]
        pipe = model.open()
        assert torch.equal(model.call_pipeline(pipe, model.encode(prompts), z, kernel, "latent"), ours)
        core = Core(model, kernel, evaluator.load_reward("colorfulness"), beta=1.0)
        drawn = evaluator.draw(core, SAMPLES, ["train"] * 3, seed=0)
        seen = drawn.images if frames == 1 else drawn.videos
        theirs = model.call_pipeline(pipe, model.encode(prompts), z, kernel, "pt")
        assert torch.equal(seen, (theirs * 255).round().byte())
        assert (drawn.videos is None) == (frames == 1)
        assert seen.shape == (3, *((5,) if frames > 1 else ()), 3, 64, 96)
        assert torch.equal(drawn.images, seen if frames == 1 else seen[:, 2])
    assert len(prints) == 2  # samples of one are never taken for the other's


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in NEWER], indirect=True
)
def test_the_cards_lines_draw_with_the_adapter(family, tmp_path, monkeypatch):
    """As they stand, at the run's size; of a video all frames."""
    model = loaded(str(repository(family).path()), **SMALL.get(family, {}))
    perturb(model, 0.1)
    model.save(tmp_path)
    settings = {"model.name": str(repository(family).path()), "sampler.steps": 2, "sampler.spacing": "auto"}
    settings |= {f"model.{name}": value for name, value in SMALL.get(family, {}).items()}
    monkeypatch.chdir(tmp_path)
    exec(redraw(resolve("ddpo", reward="colorfulness", overrides=settings), model, "tiger", 0), {})
    (drawn,) = tmp_path.glob("redrawn.*")
    with Image.open(drawn) as image:
        frames = model.config.frames
        assert (image.height, image.width, getattr(image, "n_frames", 1)) == (*model.picture_size(), frames)


@torch.no_grad()
def test_wan_22_is_read_where_one_transformer_denoises_at_every_level(hub, tmp_path):
    """Its autoencoder packs 2×2 pixels, and its pipeline gives each token its time; a pair is refused."""
    write([repository(VIDEO)], hub, "tiny")
    folder = shutil.copytree(repository(VIDEO).path(), tmp_path / "wan22")
    vae = {"base_dim": 4, "decoder_base_dim": 4, "is_residual": True, "in_channels": 12, "out_channels": 12,
           "patch_size": 2, "scale_factor_spatial": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": 4,
           "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}  # fmt: skip
    shutil.rmtree(folder / "vae")
    with seeded(0, "wan22"):
        build("AutoencoderKLWan", vae).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"expand_timesteps": True, "boundary_ratio": None, "transformer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = loaded(str(folder), size=[64, 96], frames=5)
    assert model.latent_shape == (4, 2, 4, 6)
    agree_from_prompts(model)
    index["transformer_2"] = index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BenchError, match="transformer_2"):
        loaded(str(folder))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("emoji", "model.size=[64,64]", "the files of a StableDiffusionPipeline say how large its pictures are"),
        ("emoji", "model.frames=5", "a StableDiffusionPipeline draws pictures"),
        ("qwen-image", "model.frames=5", "a QwenImagePipeline draws pictures"),
        ("qwen-image", "model.size=[500,512]", "both have to be multiples of 16"),
        (VIDEO, "model.size=[64,88]", "both have to be multiples of 16"),
        (VIDEO, "model.frames=4", "this autoencoder's videos have 1, 5, 9, 13, … frames"),
        ("ring", "model.frames=5", "'ring' draws points"),
        ("emoji_mixture", "model.size=[64,64]", "'emoji_mixture' is no pipeline"),
    ],
)
def test_a_size_that_cannot_be_is_refused(bench, tmp_path, monkeypatch, untried, name, settings, words):
    """Also where the weights are not here."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    status, text = bench("run", "ddpo", "--model", name, "--reward", "colorfulness", "--dry-run", "--set", settings)
    assert (status, words in " ".join(text.split())) == (2, True), text


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("name", ["sana-600m", VIDEO])
def test_the_grid_of_a_solver_of_higher_order_is_near_ours(name, steps):
    """Its first level lies beside 1, or its last beside 0, by 0.001 before the shift."""
    kind, options = CARDS[name].architecture.scheduler
    scheduler = getattr(diffusers, kind).from_config(options)
    scheduler.set_timesteps(steps)
    kernel = make_kernel(blueprint(resolve("ddpo", overrides={"model.name": name})).spec, SamplerConfig(steps=steps))
    torch.testing.assert_close(kernel.sigmas[:-1], scheduler.sigmas[:-1], rtol=0, atol=0.003)
    torch.testing.assert_close(kernel.timesteps, scheduler.timesteps.float(), rtol=0, atol=3.0)


@pytest.mark.parametrize("steps", [4, 28])
def test_the_grid_of_qwen_image_is_that_of_its_pipeline(steps):
    """Its shift grows with the picture, and its levels end at 0.02."""
    kind, options = CARDS["qwen-image"].architecture.scheduler
    scheduler = getattr(diffusers, kind).from_config(options)
    mu = calculate_shift(4096, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    kernel = flow_kernel(steps, spacing="qwen", tokens=4096, final_noise=0.0)
    assert torch.equal(kernel.sigmas, scheduler.sigmas)


@torch.no_grad()
def test_sana_reads_a_prompt_with_the_instruction_and_the_empty_one_without(hub):
    write([repository("sana-600m")], hub, "tiny")
    model = loaded("sana-600m")
    prompt, null = model.encode([""]).parts, model.unconditional().parts
    text, mask, null_text, null_mask = model.pipeline.encode_prompt(
        "", True, complex_human_instruction=INSTRUCTION, max_sequence_length=300
    )
    assert torch.equal(prompt["text"], text) and torch.equal(prompt["mask"], mask.float())
    assert torch.equal(null["text"], null_text) and torch.equal(null["mask"], null_mask.float())
    assert not torch.equal(text, null_text)


@torch.no_grad()
@pytest.mark.parametrize("name", ["z-image-turbo", "qwen-image", "sana-600m"])
def test_padding_of_a_text_changes_nothing(hub, name):
    """What stands there is not read, whatever it is."""
    write([repository(name)], hub, "tiny")
    model = loaded(name)
    z, t, text = (
        Noise(0, "train", SAMPLES)(0, model.latent_shape),
        torch.tensor(500.0),
        model.encode(["cat", "", "a fox"]),
    )
    states, mask = text.parts["text"], text.parts["mask"]
    assert len(set(mask.sum(1).tolist())) > 1
    other = Conditioning({"text": states + 10 * (1 - mask)[..., None], "mask": mask})
    assert torch.equal(model.predict(z, t, other), model.predict(z, t, text))


@pytest.mark.parametrize("steps", [4, 28])
def test_the_grid_of_flux2_is_that_of_its_pipeline(steps):
    """Its shift depends on the number of steps too."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = compute_empirical_mu(4096, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    kernel = flow_kernel(steps, spacing="flux2", tokens=4096, final_noise=0.0)
    assert torch.equal(kernel.sigmas, scheduler.sigmas)


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory) -> Path:
    """A small Stable Diffusion 3 whose text, T5's too, is no wider than the states of both CLIP encoders."""
    changes = {"transformer": {"joint_attention_dim": 32}, "text_encoder_3": {"d_model": 32}}
    folder, networks = tmp_path_factory.mktemp("narrow"), CARDS["sd35_medium"].architecture.networks.items()
    clip = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=77)
    with seeded(0, "narrow"):
        parts = {name: build(network.kind, network.tiny | changes.get(name, {})) for name, network in networks}
    scheduler, t5 = FlowMatchEulerDiscreteScheduler(shift=3.0), TOKENIZERS["T5EncoderModel"](folder)
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
def test_parts_are_those_that_the_index_names(bench, narrow_folder, tmp_path, left_out, status, words):
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
def test_text_that_the_transformer_cannot_hold_is_refused_by_a_dry_run(bench, narrow_folder, tmp_path, part, key):
    folder = shutil.copytree(narrow_folder, tmp_path / "copy")
    network = CARDS["sd35_medium"].architecture.networks[part]
    build(network.kind, network.tiny | {key: 40}).save_pretrained(folder / part)
    status, text = dry_run(bench, folder)
    assert status == 2 and "joint_attention_dim = 32" in text, text
