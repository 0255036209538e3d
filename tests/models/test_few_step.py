"""Few-step students: what they are, what they refuse, and which methods run on them."""

import math

import pytest
import torch

from bench import registry
from bench.config import resolve
from bench.errors import BenchError
from bench.models import catalogue
from bench.models.analytic import RingFlowModel, RingFlowTurboModel
from bench.runs.build import build_method
from bench.runs.preflight import UNFIT, check
from bench.sampling.grids import flow_kernel
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Batch, rollout

STUDENTS = [name for name in catalogue.names() if catalogue.few_step(name)]
METHODS = [name for name in registry.BUILT_IN["methods"] if name != "judged"]
NOISY = ["sampler.rule=cps", "sampler.eta=0.5", "sampler.final_noise=0.1"]


def names(count: int) -> list[tuple[str, int]]:
    return [("", i) for i in range(count)]


def draw(model, steps: int, count: int) -> torch.Tensor:
    kernel = flow_kernel(steps, eta=0.0, spacing="shifted", final_noise=0.0, dtype=torch.float64)
    samples = names(count)
    batch = Batch([""] * count, samples, model.encode([""] * count))
    return rollout(model, kernel, batch, Noise(0, "evaluate", samples), prior=True).latents


def test_the_rings_student_lands_where_many_steps_of_its_teacher_do():
    student, teacher = RingFlowTurboModel(dtype=torch.float64), RingFlowModel(dtype=torch.float64)
    few, many = draw(student, 4, 256), draw(teacher, 800, 256)[:, ::200]
    assert torch.allclose(few[:, 1:-1], many[:, 1:-1], atol=0.02)
    distance = (few[:, -1] - many[:, -1]).norm(dim=1)
    assert distance.median() < 0.01
    assert (draw(teacher, 4, 256)[:, -1] - many[:, -1]).norm(dim=1).median() > 10 * distance.median()
    shares = torch.cdist(few[:, -1], student.modes).argmin(1).bincount(minlength=8) / 256
    assert (shares - 1 / 8).abs().max() < 4 * math.sqrt(7 / 64 / 256)


def test_the_student_is_another_prior_than_its_teacher():
    assert RingFlowTurboModel().fingerprint() != RingFlowModel().fingerprint()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_student_or_is_refused_with_the_reason(method):
    """On a noisy sampler, so that what needs densities is not refused for the want of them."""
    assignments = [*NOISY, *(f"evaluation.{text}" for text in NOISY), "train.samples_per_prompt=8"]
    config = resolve(method, suite="ring_flow_turbo", assignments=assignments)
    unmet = [need for need in UNFIT if getattr(build_method(config).needs, need)]
    if not unmet:
        check(config)
        return
    with pytest.raises(BenchError, match=r"ring_flow, or one of the methods .*draft.*dmdr") as found:
        check(config)
    assert UNFIT[unmet[0]] in str(found.value)
    check(resolve(method, suite="ring_flow", assignments=["train.samples_per_prompt=8"]))


def test_whoever_declares_a_target_takes_the_model_for_what_no_student_is():
    for method in METHODS:
        kind = registry.load("methods", method)
        built = kind(kind.Config())
        if built.needs.training and built.tilted():
            assert any(getattr(built.needs, need) for need in UNFIT), method


def test_a_method_whose_options_ask_for_more_is_refused_too():
    check(resolve("draft_full", suite="ring_flow_turbo", assignments=NOISY))
    with pytest.raises(BenchError, match="the first noise, which these leave as it is"):
        check(resolve("draft_full", suite="ring_flow_turbo", assignments=[*NOISY, "method.kl=1"]))


@pytest.mark.parametrize("student", STUDENTS)
def test_a_student_knows_its_own_sampler_alone(student):
    card = catalogue.few_step(student)
    config = resolve("draft").sampler
    own = {"steps": card.steps[0], "guidance": 1, "spacing": card.spacing or "auto"}
    card.require(student, config.model_copy(update=own))
    changes = {"steps": 20, "guidance": 3.0, **({"spacing": "logsnr"} if card.spacing else {})}
    for key, value in changes.items():
        with pytest.raises(BenchError, match=rf"sampler.{key} = {value}: '{student}' was distilled .*sampler.{key}="):
            card.require(student, config.model_copy(update=own | {key: value}))


@pytest.mark.parametrize("assignment", ["sampler.steps=8", "evaluation.sampler.steps=20", "train.guidance=2"])
def test_every_sampler_of_a_run_is_the_students(assignment):
    with pytest.raises(BenchError, match=r"distilled|guidance"):
        check(resolve("ddpo", suite="ring_flow_turbo", assignments=[*NOISY, assignment]))


def test_a_method_for_students_is_refused_where_there_is_no_teacher():
    with pytest.raises(BenchError, match=r"'ring_flow' has none here: use --model .*ring_flow_turbo"):
        check(resolve("dmdr", suite="ring_flow"))
