"""Targets by importance sampling, and the metrics that compare with them, where the answer has a closed form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bench.metrics.prior_nll import PriorNll
from bench.metrics.share_tv import ShareTv
from bench.metrics.target_sw2 import TargetSw2
from bench.metrics.within_mode import WithinMode

from bench.evaluation.target import Tilted
from bench.metric import Evaluation, Samples
from bench.models.mixture import Mixture
from bench.options import Config
from bench.sampling.noise import generator

PROMPTS = ("one", "two")
FAVOUR = torch.tensor([0.0, 1.0, -1.0])  # what a component adds to βr
PUSH = 0.5  # what a unit of the first coordinate adds


def mixture() -> Mixture:
    """Two prompts, three components that hardly overlap, eight dimensions, rank 2."""
    rng = generator(0, "select", "mixture of targets")

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    tensors = {"log_weights": normal(2, 3), "means": 8 * normal(2, 3, 8), "floor": torch.tensor(0.2)}
    tensors |= {"bases": torch.linalg.qr(normal(2, 3, 8, 2)).Q, "scales": torch.tensor([1.0, 2.0]).expand(2, 3, 2)}
    return Mixture(tensors, "abc", torch.float64)


def tilted(prior: Mixture, c: int, count: int = 8_000, seed: int = 0) -> Tilted:
    """The target whose weights are `FAVOUR` of the component plus `PUSH` times the first coordinate."""
    x, component = prior.draw(torch.full((count,), c), generator(seed, "select", "draws", PROMPTS[c]))
    target = Tilted(prior, c, x, torch.zeros(count, dtype=torch.float64))
    own = target.posterior(x).coordinates[torch.arange(count), component]
    return replace(target, tilt=FAVOUR.double()[component] + PUSH * own[:, 0])


def evaluation(prior: Mixture, finetuned: dict[str, torch.Tensor], count: int = 400) -> Evaluation:
    """finetuned: prompt → latents; the prior's samples are draws of its own."""

    def samples(latents: dict[str, torch.Tensor]) -> Samples:
        prompts = [prompt for prompt in PROMPTS for _ in latents[prompt]]
        flat = torch.cat([latents[prompt] for prompt in PROMPTS])
        return Samples(torch.zeros(len(flat), 3, 2, 2).byte(), prompts, ["train"] * len(flat), {}, latents=flat)

    rng = generator(9, "select", "prior")
    own = samples({prompt: prior.draw(torch.full((count,), c), rng)[0] for c, prompt in enumerate(PROMPTS)})
    targets = {prompt: tilted(prior, c) for c, prompt in enumerate(PROMPTS)}
    sets = {"finetuned": samples(finetuned), "prior": own, "reference": own, "floor": own}
    return Evaluation(**sets, reward="r", beta=1, features=lambda s, space=None: s, feature_space="", targets=targets)


def from_target(prior: Mixture, count: int = 400) -> dict[str, torch.Tensor]:
    return {
        prompt: tilted(prior, c, seed=5).draws(count, generator(1, "select", "mine"))
        for c, prompt in enumerate(PROMPTS)
    }


def test_importance_sampling_finds_the_closed_form():
    """Weights e^{favour_j} and a standard Gaussian tilted by e^{PUSH y}: normaliser, KL, shares and means are known."""
    prior = mixture()
    for c in range(2):
        target, weights = tilted(prior, c), prior.log_weights[c].exp()
        factors = weights * FAVOUR.exp()
        log_z = float(factors.sum().log()) + PUSH**2 / 2
        shares = factors / factors.sum()
        assert target.log_normaliser == pytest.approx(log_z, abs=0.05)
        assert torch.allclose(target.shares, shares, atol=0.02)
        reward = float(shares @ FAVOUR.double()) + PUSH**2
        assert target.mean(target.tilt)[0] == pytest.approx(reward, abs=4 * target.mean(target.tilt)[1])
        assert target.kl == pytest.approx(reward - log_z, abs=0.05)
        means, deviations = target.places
        assert torch.allclose(means, torch.tensor([PUSH, 0.0]).double().expand(3, 2), atol=0.1)
        assert torch.allclose(deviations, torch.ones(3, 2).double(), atol=0.1)


def test_the_stated_error_is_that_of_repetitions():
    prior = mixture()
    repeats = [tilted(prior, 0, 500, seed) for seed in range(60)]
    centres, errors = zip(*(one.mean(one.tilt) for one in repeats), strict=True)
    assert np.std(centres) == pytest.approx(np.mean(errors), rel=0.3)


@pytest.mark.parametrize("metric", [ShareTv, WithinMode, TargetSw2])
def test_draws_of_the_target_score_its_floor_and_the_prior_more(metric):
    prior = mixture()
    for measured, floor in zip(*[iter(metric(Config())(evaluation(prior, from_target(prior))))] * 2, strict=True):
        assert floor.name == f"{measured.name}/floor"
        assert measured.value == pytest.approx(floor.value, abs=5 * floor.standard_error + 0.3 * floor.value)
        if measured.name != "within_mode/spread/train":  # the tilt moves means and keeps widths
            assert measured.prior > 2 * floor.value


def test_each_error_sees_what_it_is_for():
    prior = mixture()
    exact = from_target(prior)

    def scores(change) -> dict[str, float]:
        changed = evaluation(prior, {p: change(x, c) for c, (p, x) in enumerate(exact.items())})
        metrics = (ShareTv, WithinMode, PriorNll, TargetSw2)
        return {m.name: m.value for metric in metrics for m in metric(Config())(changed)}

    def shrunken(x: torch.Tensor, c: int) -> torch.Tensor:
        """Right shares, right means, half the width."""
        target = tilted(prior, c)
        nearest = target.posterior(x).log_weights.argmax(1)
        means = torch.stack([x[nearest == j].mean(0) if (nearest == j).any() else x[0] for j in range(3)])[nearest]
        return means + (x - means) / 2

    def dropped(x: torch.Tensor, c: int) -> torch.Tensor:
        """Only the component that most samples lie in."""
        nearest = tilted(prior, c).posterior(x).log_weights.argmax(1)
        kept = x[nearest == nearest.mode().values]
        return kept[torch.arange(len(x)) % len(kept)]

    right = scores(lambda x, c: x)
    narrow, single = scores(shrunken), scores(dropped)
    noisy = scores(lambda x, c: x + 0.2 * torch.from_numpy(generator(c, "select", "dust").standard_normal(x.shape)))
    assert narrow["share_tv/train"] == pytest.approx(right["share_tv/train"], abs=0.02)
    assert narrow["within_mode/spread/train"] == pytest.approx(np.log(2), abs=0.1)
    assert narrow["prior_nll/train"] < right["prior_nll/train"] - 1
    assert single["share_tv/train"] > right["share_tv/train"] + 0.2 and single["within_mode/mean/train"] < 0.3
    assert noisy["prior_nll/train"] == pytest.approx(
        right["prior_nll/train"] + 6 / 2, abs=1
    )  # six directions outside the bases
    assert min(narrow["target_sw2/train"], single["target_sw2/train"]) > right["target_sw2/train"]


def test_a_target_with_few_effective_draws_is_refused():
    prior = mixture()
    few = evaluation(prior, from_target(prior))
    targets = {prompt: replace(target, tilt=100 * target.tilt) for prompt, target in few.targets.items()}
    measured = ShareTv(Config())(replace(few, targets=targets))
    assert (
        measured[0].value is None and "effective draws" in measured[0].note and "lower reward.beta" in measured[0].note
    )


def test_other_models_have_no_such_rows():
    prior = mixture()
    other = replace(evaluation(prior, from_target(prior)), targets=None)
    assert [m for metric in (ShareTv, WithinMode, PriorNll, TargetSw2) for m in metric(Config())(other)] == []
