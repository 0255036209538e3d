"""The contract suite: every plugin passes it, broken ones fail the check that is meant for them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching
from bench.methods.backprop.draft import DRaFT
from bench.methods.policy_gradient.ddpo import DDPO
from scaffold import ROOT, by_family
from torch import Tensor

from bench import Core, Evaluation, Loss, Measurement, Metric, Needs, Reward, registry, service
from bench.diagnose.selftest import KINDS, checks, models, selftest
from bench.models.analytic import RingModel
from bench.models.family import Call, Parts
from bench.models.stable_diffusion import StableDiffusion
from bench.sampling.trajectory import Batch

EXAMPLE = ROOT / "tests" / "example_plugin"
ALL = [
    pytest.param(kind, name, id=name, marks=marks)
    for kind in KINDS[:-1]
    for name, marks in (
        [(one.values[0], one.marks) for one in by_family(registry.BUILT_IN["methods"])]
        if kind == "methods"
        else [(name, pytest.mark.slow if name == "hpsv3" else ()) for name in registry.plugins(kind)]
    )
]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_plugin_keeps_the_contract(hub, monkeypatch, kind, name):
    """Those with weights on scaled-down random ones, through the real loading code."""
    monkeypatch.setattr(service, "LONGEST", 0.0)  # no service answers here, however long one waits between the tries
    outcomes = list(selftest(kind, name))
    assert len(outcomes) == len(checks(kind))
    assert not [found for found in outcomes if found.status == "failed"]


WHOLE = {name: () for name in ("ring", "gaussian", "ring_flow", "gaussian_flow", "ring_flow_turbo")} | {
    name: pytest.mark.slow for name in ("emoji", "emoji_flow", "emoji_turbo", *registry.BUILT_IN["pipelines"])
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in WHOLE.items()])
def test_every_model_keeps_the_contract(name):
    """Families on scaled-down random weights."""
    outcomes = {found.check: found for found in selftest("models", name)}
    assert len(outcomes) == len(models.CHECKS)
    assert not [found for found in outcomes.values() if found.status == "failed"]
    skipped = {check for check, found in outcomes.items() if found.status == "skipped"}
    assert skipped <= {"its pipeline agrees" if models.catalogue.is_analytic(name) else "the output means what it says"}
    assert "emoji" not in name or not skipped


class MeanOverMicroBatch(DRaFT):
    """Averages where it should add."""

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        for loss in super().losses(core, data):
            yield Loss(loss.values / len(loss.values))


class OwnDice(DRaFT):
    """Draws from global random state."""

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        for loss in super().losses(core, data):
            yield Loss(loss.values * torch.rand(()))


class Silent(DRaFT):
    """No gradient reaches anything."""

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        for loss in super().losses(core, data):
            yield Loss(loss.values * 0)


class Undeclared(AdjointMatching):
    """Uses the gradient of a reward without saying so."""

    needs = Needs(density=True)

    def tilted(self) -> bool:
        return False


class Forgetful(DDPO):
    """Has state and stores none."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None


class Elsewhere(AdjointMatching):
    """Declares the target and aims at β/2."""

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        yield from super().losses(replace(core, beta=core.beta / 2), data)


class Sociable(Reward):
    """Scores an image against its batch."""

    scale = source = "test"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        means = images.flatten(1).mean(1)
        return means - means.mean()


class Detached(Sociable):
    """Declares a gradient that it has not."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.detach().flatten(1).mean(1)


class Halved(Sociable):
    """Its gradient is half of the derivative."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        means = images.flatten(1).mean(1)
        return (means + means.detach()) / 2


class NotANumber(Metric):
    """Measures NaN without a note."""

    direction = "lower"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        return [Measurement("broken", float("nan"), n=1)]


class NoShare(NotANumber):
    """Declares a share and measures two."""

    support = "share"

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        return [Measurement("broken", 2.0, n=1)]


class Restless(NotANumber):
    """Never measures the same twice."""

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        return [Measurement("broken", float(torch.rand(())), n=1)]


class Biased(NotANumber):
    """Sees a difference where there is none."""

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        return [Measurement("broken", 1.0, 0.0, 1.0, 0.1, n=1)]


class Brittle(NotANumber):
    """Cannot do without densities."""

    def __call__(self, evaluation: Evaluation) -> list[Measurement]:
        return [Measurement("broken", float(evaluation.finetuned.step_kl.mean()), n=1)]


class Crowded(RingModel):
    """A prediction depends on its batch."""

    def predict(self, z: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return super().predict(z, *arguments, **options) + 0.01 * z.mean(0)


class Doubled(RingModel):
    """Predicts in float64."""

    def predict(self, z: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return super().predict(z, *arguments, **options).double()


class Unswitched(RingModel):
    """Its prior is the policy."""

    def predict(self, *arguments: Any, prior: bool = False, **options: Any) -> Tensor:
        return super().predict(*arguments, **options)


class Amnesiac(RingModel):
    """Reads the file and forgets it."""

    def load(self, folder: Path) -> None:
        (folder / "analytic.safetensors").read_bytes()


class Severed(RingModel):
    """No gradient passes its decoder."""

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z - z.detach()


class Misread(RingModel):
    """Its noise is said to be v."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.spec = replace(self.spec, output="v_prediction")


class AtHome(RingModel):
    """Leaves a tensor on the host."""

    def decode(self, z: Tensor) -> Tensor:
        return z + torch.zeros(2)


class Late(StableDiffusion):
    """One training step off."""

    @staticmethod
    def denoise(call: Call, z: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return StableDiffusion.denoise(call, z, t - 1, parts)


class Switching(StableDiffusion):
    """The adapters are switched outside of what is computed again."""

    def predict(self, *arguments: Any, prior: bool = False, **options: Any) -> Tensor:
        if not prior:
            return super().predict(*arguments, **options)
        with self.using({}), self._lora.off():
            return super().predict(*arguments, **options)


def planted(kind: str, name: str, broken: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads to the broken plugin."""
    monkeypatch.setitem(registry.BUILT_IN[kind], name, registry.Plugin(f"{__name__}:{broken.__name__}"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[test_every_plugin_keeps_the_contract.__module__])
    registry.plugins.cache_clear()


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Names are read again after the test."""
    yield
    registry.plugins.cache_clear()


@pytest.mark.parametrize(
    ("broken", "check"),
    [(Late, models.its_pipeline_agrees), (Switching, models.checkpointing_leaves_gradients_unchanged)],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_broken_family_fails_the_check_that_is_meant_for_it(
    broken, check, pipeline_folder, monkeypatch, clean_registry
):
    planted("pipelines", "StableDiffusionPipeline", broken, monkeypatch)
    monkeypatch.setattr(models, "CHECKS", [models.the_prior_switch_is_exact, check])
    assert [found.status for found in selftest("models", str(pipeline_folder))] == ["passed", "failed"]


@pytest.mark.parametrize(
    ("kind", "broken", "checks"),
    [
        ("methods", MeanOverMicroBatch, {"batch size does not matter"}),
        ("methods", OwnDice, {"equal seeds give equal losses", "batch size does not matter"}),
        ("methods", Silent, {"gradients reach what trains"}),
        ("methods", Undeclared, {"losses are well formed", "equal batches make equal calls"}),
        ("methods", Forgetful, {"state survives storage", "a resumed run is the same run"}),
        ("methods", Elsewhere, {"the target is reached"}),
        ("rewards", Sociable, {"neighbours do not matter"}),
        ("rewards", Detached, {"the gradient is the derivative"}),
        ("rewards", Halved, {"the gradient is the derivative"}),
        ("metrics", NotANumber, {"measurements are well formed", "hard cases are notes"}),
        ("metrics", NoShare, {"measurements are well formed"}),
        ("metrics", Restless, {"measuring twice gives the same"}),
        ("metrics", Biased, {"an unchanged model differs by nothing"}),
        ("metrics", Brittle, {"hard cases are notes"}),
        ("models", Crowded, {"neighbours do not matter"}),
        ("models", Doubled, {"predictions and images are well formed"}),
        ("models", Unswitched, {"the prior switch is exact"}),
        ("models", Amnesiac, {"adapters are saved and loaded"}),
        ("models", Severed, {"decode is differentiable"}),
        ("models", Misread, {"the output means what it says"}),
        ("models", AtHome, {"it runs on a device"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_broken_plugin_fails_the_check_that_is_meant_for_it(kind, broken, checks, monkeypatch, clean_registry):
    planted(kind, "broken", broken, monkeypatch)
    outcomes = {found.check: found for found in selftest(kind, "broken")}
    failed = {check for check, found in outcomes.items() if found.status == "failed"}
    assert checks <= failed < set(outcomes), outcomes


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """The example package installed into a folder; calls `bench` in a process that sees it."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(EXAMPLE)], check=True)
    environment = os.environ | {"PYTHONPATH": str(target), "COLUMNS": "150"}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "bench", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return call


@pytest.mark.slow  # test_contributing.py installs one too
def test_an_installed_package_brings_its_plugins(installed):
    listed = installed("ls")
    assert listed.returncode == 0, listed.stderr
    for name in ("raft", "brightness", "contrast"):
        (line,) = (line for line in listed.stdout.splitlines() if line.startswith(f"{name} "))
        assert "[example-plugin]" in line
        tested = installed("selftest", name)
        assert tested.returncode == 0, tested.stdout
        assert "failed" not in tested.stdout


def test_selftest_of_a_folder(bench, pipeline_folder):
    status, text = bench("selftest", pipeline_folder)
    assert status == 0, text
    assert "its pipeline agrees" in text


def test_selftest_names_what_it_does_not_know(bench):
    status, text = bench("selftest", "nabla_gnf")
    assert status == 2
    assert "unknown plugin 'nabla_gnf'" in text
    assert "nabla_gfn" in text
