"""Evaluation: pairing, caching, and the divergence of the sampling processes."""

from dataclasses import replace

import pytest
import torch
from bench.methods.best_of_n import BestOfN
from bench.metrics.vendi import Vendi
from scaffold import Brightness

from bench.config import resolve
from bench.diagnose.selftest.scaffold import perturb
from bench.errors import NonFiniteError
from bench.evaluation.draw import draw, sample_names
from bench.evaluation.evaluator import Evaluator
from bench.metric import Measurement
from bench.options import Config
from bench.prompts import load_prompts, split
from bench.runs.build import build_core, evaluation_core

PROMPTS = split("test", ["cat", "dog", "red bird", "fish", "bear", "apple"])


@pytest.fixture
def config(pipeline_folder):
    counts = ["evaluation.train_prompts=2", "evaluation.validation_prompts=1", "evaluation.test_prompts=1"]
    return resolve(
        "prior",
        reward="colorfulness",
        overrides={"model.name": str(pipeline_folder), "evaluation.rewards": []},
        assignments=["evaluation.samples_per_prompt=2", *counts],
    )


def test_splits_are_disjoint_stable_and_complete():
    names = [f"prompt {i}" for i in range(53)]
    one, two = split("a", names), split("b", names[::-1] + names[:3])
    assert (one.train, one.validation, one.test) == (two.train, two.validation, two.test)
    assert sorted(one.all) == sorted(names)
    assert one.train and one.validation and one.test


def test_a_limit_cuts_the_training_part_alone(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    whole, cut = load_prompts(str(tmp_path / "p.txt")), load_prompts(str(tmp_path / "p.txt"), 3)
    assert cut.train == whole.train[:3]
    assert (cut.validation, cut.test) == (whole.validation, whole.test)
    assert cut.digest != whole.digest


def test_prior_sets_are_drawn_once_and_paired(core, config, tmp_path):
    evaluator = Evaluator(core, config, PROMPTS, tmp_path)
    first = {name: evaluator.prior_set(name) for name in ("prior", "reference", "floor")}
    finetuned = draw(core, evaluator.names, evaluator.splits, seed=evaluator.seed)
    assert torch.equal(finetuned.images, first["prior"].images)  # an untouched adapter: same noise, same images
    assert float(finetuned.step_kl.abs().max()) == 0
    images = [samples.images for samples in first.values()]
    for i, a in enumerate(images):
        for b in images[:i]:
            assert (a.float() - b.float()).abs().mean() > 1
    assert evaluator.prior_set("prior") is first["prior"]  # nor scored twice
    drawn = []
    again = Evaluator(core, config, PROMPTS, tmp_path).prior_set("prior", on_batch=drawn.append)
    assert not drawn
    assert torch.equal(again.images, first["prior"].images)
    changed = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"seed": 1})})
    other = Evaluator(core, changed, PROMPTS, tmp_path).prior_set("prior", on_batch=drawn.append)
    assert drawn
    assert not torch.equal(other.images, first["prior"].images)


def test_noise_is_that_of_the_seed_unless_fixed(core, config, tmp_path):
    """A spread over seeds then holds the evaluation's noise; whatever the method, a seed has one."""

    def evaluator(seed, fixed=None):
        changed = config.evaluation.model_copy(update={"seed": fixed})
        return Evaluator(core, config.model_copy(update={"seed": seed, "evaluation": changed}), PROMPTS, tmp_path)

    images = [evaluator(*seeds).prior_set("prior").images for seeds in ((0,), (0,), (1,), (1, 0))]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert torch.equal(images[0], images[3])


def test_a_metric_that_raises_fails_alone(core, config, tmp_path, monkeypatch, caplog):
    def broken(self, evaluation):
        raise ValueError("no eigenvalues")

    monkeypatch.setattr(Vendi, "__call__", broken)
    metrics = config.evaluation.model_copy(update={"metrics": ["vendi", "path_kl"]})
    evaluator = Evaluator(core, config.model_copy(update={"evaluation": metrics}), PROMPTS, tmp_path)
    evaluation, found = evaluator.evaluate()
    assert [one.name for one in found] == ["vendi", "path_kl", "path_kl/early", "path_kl/late"]
    assert found[0].value is None
    assert found[0].note == "failed: ValueError: no eigenvalues"
    assert found[1].value == 0
    assert "metric vendi failed: ValueError: no eigenvalues" in caplog.text
    assert len(evaluation.finetuned.images)  # for the pictures


def test_numbers_of_a_metric_that_are_none_are_missing(core, config, tmp_path, monkeypatch, caplog):
    """With a note, if they stand for the model; an error of one sample shows no spread, which needs none."""
    nan, inf = float("nan"), float("inf")
    made = [
        Measurement("vendi/a", nan, 1.0, nan, 0.5, 3.0, note="few"),
        Measurement("vendi/b", 2.0, -inf, inf, inf, 3.0),
        Measurement("vendi/c", 2.0, 1.0, 1.0, nan, nan),
    ]
    monkeypatch.setattr(Vendi, "__call__", lambda self, evaluation: made)
    metrics = config.evaluation.model_copy(update={"metrics": ["vendi"]})
    found = Evaluator(core, config.model_copy(update={"evaluation": metrics}), PROMPTS, tmp_path).evaluate()[1]
    assert found == [
        Measurement("vendi/a", None, 1.0, None, 0.5, 3.0, note="not finite: value is nan, difference is nan; few"),
        Measurement("vendi/b", 2.0, None, None, None, 3.0, note="not finite: prior is -inf, difference is inf"),
        Measurement("vendi/c", 2.0, 1.0, 1.0),
    ]
    assert caplog.text.count("and is left out") == 2


def test_path_divergence_is_the_expected_log_ratio(core, config):
    """`KL(P_θ‖P_#) = E_θ[log P_θ/P_#]`: the closed form by step agrees with the paths' own log-ratios."""
    perturb(core.model, 0.02)
    names = [("cat", i) for i in range(256)]
    samples = draw(core, names, ["train"] * len(names), seed=0)
    kl, ratio = samples.step_kl.double().sum(1), samples.log_ratio
    error = float((kl + ratio).std() / len(names) ** 0.5)
    assert float(kl.mean()) > 5 * error  # the test can fail
    assert abs(float((kl + ratio).mean())) < 4 * error
    normaliser = torch.logsumexp(ratio, 0) - torch.log(torch.tensor(256.0))  # E_θ[P_#/P_θ] = 1
    assert abs(float(normaliser)) < 0.5


def test_sample_names_take_every_part(config):
    names, splits = sample_names(PROMPTS, config.evaluation)
    assert names[:3] == [(PROMPTS.train[0], 0), (PROMPTS.train[0], 1), (PROMPTS.train[1], 0)]
    assert [names[i][0] for i in (4, 6)] == [PROMPTS.validation[0], PROMPTS.test[0]]
    assert splits == ["train"] * 4 + ["validation"] * 2 + ["test"] * 2


def test_a_reward_that_is_not_a_number_stops_a_draw(core, config, tmp_path):
    """Best of n scores while it samples; a comparison with NaN would keep the first draw in silence."""

    class Failing(Brightness):
        def __call__(self, images, prompts):
            bad = torch.tensor([prompt == "dog" for prompt in prompts])
            return super().__call__(images, prompts).masked_fill(bad, float("nan"))

    core = replace(core, reward_model=Failing(Config()))
    names, splits = sample_names(split("test", ["cat", "dog"]), config.evaluation)
    with pytest.raises(NonFiniteError, match="'dog'"):
        draw(core, names, splits, seed=0, method=BestOfN(BestOfN.Config(n=2)))


def test_a_coarse_sampler_is_far_from_an_accurate_one(tmp_path):
    """On the ring, and the sets are unpaired: the accurate sampler against itself scores the floor."""
    found = {}
    for steps, eta in ((3, 1.0), (50, 0.0)):
        settings = ["evaluation.metrics=[sampler_gap]", "evaluation.samples_per_prompt=2048"]
        settings += [f"sampler.steps={steps}", f"sampler.eta={eta}", "evaluation.sampler.steps=4"]
        config = resolve("prior", overrides={"model.name": "ring"}, assignments=settings)
        prompts = split("test", ["a", "b"])
        evaluator = Evaluator(evaluation_core(build_core(config), config), config, prompts, tmp_path)
        (gap,) = evaluator.evaluate()[1]
        found[steps] = gap.value, gap.prior
    assert found[3][0] > 20 * found[3][1]
    assert found[50][0] == found[50][1] == found[3][1] > 0
