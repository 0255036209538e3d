"""Small real things for the tests: a random Stable-Diffusion-style pipeline in the real on-disk layout."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads that spin beside another job take ten times as long

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from scaffold import LONG, Brightness, pipeline_model, write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from bench.core import Core
from bench.metric import Evaluation
from bench.models.stable_diffusion import StableDiffusion
from bench.options import Config
from bench.sampling.grids import ddim_kernel
from bench.sampling.noise import seeded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of `--no-loadscope-reorder`."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: the garbage collector need not look at it, or look so often."""
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pipeline of random weights: 8×8 latents, 16×16 images."""
    folder = tmp_path_factory.mktemp("pipeline")
    with seeded(0, "test pipeline"):
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with scaled-down random weights of everything that the full-size settings load."""
    from bench.hub import Repository
    from bench.models import random_weights
    from bench.models.card import HubCard
    from bench.models.cards import CARDS

    cache = tmp_path_factory.mktemp("hub")
    later = {card.hub for card in CARDS.values() if isinstance(card, HubCard) and card.name not in ("sd15", "sd21")}
    random_weights.write([Repository(name, ()) for name in random_weights.WRITERS if name not in later], cache, "tiny")
    return cache


@pytest.fixture
def hub(random_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That cache, in use."""
    monkeypatch.setenv("HF_HUB_CACHE", str(random_hub))
    return random_hub


@pytest.fixture
def family(hub: Path, request: pytest.FixtureRequest) -> str:
    """`request.param`, the name of a model; scaled-down random weights of a full-size one are in that cache."""
    from bench.models import catalogue, random_weights

    random_weights.write(filter(None, [catalogue.repository(request.param)]), hub, "tiny")
    return request.param


@pytest.fixture
def model(pipeline_folder: Path) -> StableDiffusion:
    """The random pipeline with a fresh adapter."""
    return pipeline_model(pipeline_folder)


@pytest.fixture
def core(model: StableDiffusion) -> Core:
    """A core of 5 DDPM steps on the random pipeline, which is its own teacher."""
    kernel = ddim_kernel(model.spec.alphas_cumprod, 5, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    sizes = {"micro_batch": 8, "sample_batch": 8}
    return Core(model, kernel, Brightness(Config()), beta=10.0, teacher_model=(model, kernel), **sizes)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Call the command line in this process: `bench("run", …)` → (exit status, what it printed)."""
    from bench.cli.app import app

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        status = 0
        try:
            app()
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs compute no piece of the run, which takes seconds; for tests of what else they print."""
    from bench.runs.duration import Pace

    monkeypatch.setattr(Pace, "measured", lambda config: Pace(1.0, 1.0))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw one pixel and no curves, which take longer than all the rest of a small run; for tests of that rest."""
    from bench.runs import evaluate, execution

    def pixel(evaluation: Evaluation, measurements: object, core: Core, folder: Path, title: str) -> None:
        Image.new("RGB", (1, 1)).save(folder / "samples.png")

    monkeypatch.setattr(execution, "plot_curves", lambda *_: None)
    for module in (execution, evaluate):
        monkeypatch.setattr(module, "draw_samples", pixel)


@pytest.fixture
def tiny_run(bench, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`tiny_run(method, *options)`: a whole `bench run` of seconds on the random pipeline; returns its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\nred bird\nfish\nbear\napple\n")

    def call(method: str, *options: object, updates: int = 2, folder: str = "run") -> Path:
        out = tmp_path / folder
        settings = [
            "train.prompts_per_round=2", "train.samples_per_prompt=2", "sampler.steps=3", "train.checkpoint_every=1",
            "evaluation.samples_per_prompt=2", "evaluation.train_prompts=2", "evaluation.test_prompts=1",
            "evaluation.validation_prompts=0",
            "evaluation.rewards=[jpeg_compressibility]", "evaluation.at=[]",
        ]  # fmt: skip
        if method in ("nabla_gfn",):
            settings.append("method.channels=[32,32]")
        sets = [word for setting in settings for word in ("--set", setting)]
        status, text = bench(
            "run", "--method", method, "--reward", "colorfulness", "--model", pipeline_folder, "--prompts", prompts,
            "--updates", updates, "--out", out, *sets, *options,
        )  # fmt: skip
        assert status == 0, text
        return out

    return call
