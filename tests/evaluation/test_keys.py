"""What is stored of the prior's samples and of features is found again, and not taken for anything else's."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import environment
from bench.config import resolve
from bench.environment import LIBRARIES
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.features import Points
from bench.hub import Download
from bench.metric import Samples
from bench.models.analytic import GaussianFlowModel, GaussianModel
from bench.prompts import PromptSet
from bench.runs.build import build_core, evaluation_core
from bench.runtime.digests import digest
from bench.sampling import noise
from bench.sampling.kernel import Kernel

PROMPTS = PromptSet("test", ["cat", "dog"], [], [])
SMALL = [
    "evaluation.samples_per_prompt=2",
    "evaluation.train_prompts=2",
    "train.micro_batch=4",
    "train.sample_batch=4",
    "sampler.steps=3",
]
VERSIONS = environment.versions()
Patch = Callable[[pytest.MonkeyPatch], None]


def evaluator(cache: Path, *settings: str, model: str = "ring", prompts: PromptSet = PROMPTS) -> Evaluator:
    small = [
        "evaluation.samples_per_prompt=2",
        "evaluation.train_prompts=2",
        "train.micro_batch=4",
        "train.sample_batch=4",
        "sampler.steps=3",
    ]
    config = resolve("prior", overrides={"model.name": model}, assignments=[*small, *settings])
    return Evaluator(evaluation_core(build_core(config, torch.device("cpu")), config), config, prompts, cache)


def drawn(one: Evaluator, name: str = "prior") -> int:
    """How many rows are drawn, not found."""
    rows: list[int] = []
    one.prior_set(name, on_batch=rows.append)
    return sum(rows)


SETTINGS = [
    "evaluation.samples_per_prompt=3",
    "evaluation.train_prompts=1",
    "evaluation.seed=1",
    "train.sample_batch=2",
    "sampler.steps=4",
    "sampler.eta=0.5",
    "sampler.rule=sde",
    "sampler.spacing=trailing",
    "sampler.final_alpha=1",
    "model.attention=eager",
    "model.compile=true",
    "model.vae_slicing=true",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_set_of_other_settings_is_drawn(tmp_path: Path, setting: str) -> None:
    assert drawn(evaluator(tmp_path)) == 4
    assert drawn(evaluator(tmp_path)) == 0
    assert drawn(evaluator(tmp_path, setting)) > 0
    assert drawn(evaluator(tmp_path)) == 0


def test_a_set_of_another_model_prompt_or_purpose_is_drawn(tmp_path: Path) -> None:
    for options in (
        {},
        {"model": "gaussian"},
        {"model": "ring_flow"},
        {"prompts": replace(PROMPTS, train=["a", "dog"])},
    ):
        one = evaluator(tmp_path, **options)
        for name in ("prior", "reference", "floor"):
            assert (drawn(one, name), drawn(one, name)) == (4, 0), (options, name)


def test_every_field_of_a_kernel_is_in_its_key() -> None:
    kernel = Kernel(torch.tensor([7, 3]), torch.tensor([0.1, 0.5, 1.0]))
    changed = {
        "timesteps": torch.tensor([7, 2]),
        "alphas_cumprod": torch.tensor([0.1, 0.6, 1.0]),
        "eta": 0.5,
        "rule": "sde",
        "output": "v_prediction",
        "sigmas": torch.tensor([0.9, 0.5, 0.0]),
        "noisy": (0, 1),
    }
    assert changed.keys() == {field.name for field in fields(Kernel)}
    keys = [kernel.key(), *(replace(kernel, **{name: value}).key() for name, value in changed.items())]
    assert len({digest(key) for key in keys}) == len(keys)


def test_every_level_of_an_analytic_models_schedule_is_in_its_fingerprint() -> None:
    class Bent(GaussianModel):
        def _levels(self) -> torch.Tensor:
            levels = super()._levels()
            return torch.cat([levels[:400], levels[400:401] * 0.999, levels[401:]])

    models = [
        GaussianModel(), Bent(), GaussianFlowModel(), GaussianModel(dim=3), GaussianModel(mean=0.6),
        GaussianModel(std=0.5), GaussianModel(dtype=torch.float64),
    ]  # fmt: skip
    assert len({model.fingerprint() for model in models}) == len(models)
    assert GaussianModel(seed=1).fingerprint() == models[0].fingerprint()


ELSEWHERE: dict[str, Patch] = {
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "noise": lambda patch: patch.setattr(noise, "VERSION", noise.VERSION + 1),
    "tf32": lambda patch: patch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True)),
    **{
        name: lambda patch, name=name: patch.setattr(environment, "versions", lambda: VERSIONS | {name: "another"})
        for name in LIBRARIES
    },
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_is_rounded_otherwise_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    one = evaluator(tmp_path)
    samples = one.prior_set("prior")
    one.features(samples)
    files = len(list(tmp_path.iterdir()))
    ELSEWHERE[what](monkeypatch)
    assert drawn(one) == 4
    one.features(samples)
    assert len(list(tmp_path.iterdir())) == files + (1 if what == "noise" else 2)


def test_other_versions_of_trackers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(evaluator(tmp_path))
    monkeypatch.setattr(environment, "versions", lambda: VERSIONS | {"wandb": "another"})
    assert drawn(evaluator(tmp_path)) == 0


def test_every_process_of_a_machine_looks_for_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has another of its GPUs; a set is used only where all find it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {"cuda:9": "B"}.get(str(device), "A"))
    one, keys = evaluator(tmp_path), []
    for device in ("cuda:0", "cuda:1", "cuda:9", "cpu"):
        monkeypatch.setattr(one.core.model, "device", torch.device(device))
        keys.append(one._set_key("evaluate", one.core))
    assert keys[0] == keys[1] and len({*keys}) == 3


def test_features_are_those_of_their_images_space_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    need = Download("https://example.org/weights.pt", "weights", ("weights.pt",))
    need.path.mkdir(parents=True)
    cache, images = tmp_path / "cache", torch.arange(144, dtype=torch.uint8).view(2, 3, 4, 6)

    def features(pixels: torch.Tensor, one: Evaluator) -> torch.Tensor:
        return one.features(Samples(pixels, ["a"] * len(pixels), ["train"] * len(pixels), {}))

    def files() -> int:
        return len(list(cache.iterdir()))

    one = evaluator(cache)
    turned = images.view(2, 3, 6, 4)
    for count, pixels in enumerate((images, turned, images.view(torch.int8), images + 1, images[:1]), 1):
        for _ in range(2):
            assert features(pixels, one).shape == pixels.shape
        assert files() == count
    features(images, evaluator(cache, "train.micro_batch=1"))
    assert files() == count + 1
    monkeypatch.setattr(Points, "files", (need,))
    for contents in ("a", "b"):
        (need.path / "weights.pt").write_text(contents)
        features(images, one)
    monkeypatch.setattr(Points, "files", (replace(need, url="https://example.org/others.pt"),))
    features(images, one)
    assert files() == count + 4
