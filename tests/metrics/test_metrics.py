"""Metrics against closed forms and against clean-fid."""

import math

import numpy as np
import pytest
import torch
from bench.metrics.coverage import Coverage, coverage
from bench.metrics.diversity import Diversity, DiversityClip, DiversityDreamSim
from bench.metrics.fid_prior import FidPrior, FidPriorPerPrompt
from bench.metrics.fid_target import FidTarget
from bench.metrics.kid_prior import KidPrior
from bench.metrics.path_kl import PathKl, PathKlSteps
from bench.metrics.reward import RewardGain, RewardPrompts
from bench.metrics.tilt_gap import TiltGap
from bench.metrics.tilt_tv import TiltTv
from bench.metrics.tilt_within import TiltWithin
from bench.metrics.vendi import Vendi
from cleanfid import fid as clean_fid
from torch import Tensor

from bench import Evaluation, Measurement, Samples
from bench.evaluation.statistics import (
    effective_sample_size,
    frechet_distance,
    kernel_distance,
    log_mean_exp,
    mean_and_error,
    moments,
    tilted_weights,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(
    rewards: Tensor,
    prompts: list[str] | None = None,
    splits: list[str] | None = None,
    step_kl: Tensor | None = None,
    log_ratio: Tensor | None = None,
    **others: Tensor,
) -> Samples:
    n = len(rewards)
    return Samples(
        torch.zeros(n, 3, 2, 2, dtype=torch.uint8),
        prompts or ["a"] * n,
        splits or ["train"] * n,
        {"main": rewards, **others},
        step_kl,
        log_ratio,
    )


def evaluation(
    finetuned: Samples,
    prior: Samples,
    reference: Samples | None = None,
    floor: Samples | None = None,
    features: tuple[Tensor, ...] = (),
    beta: float = 1.0,
) -> Evaluation:
    """`features` belong to finetuned, prior, reference and floor, in this order."""
    sets = (finetuned, prior, reference or prior, floor or prior)
    table = {id(own): feature.float() for own, feature in zip(sets, features, strict=False)}
    return Evaluation(*sets, "main", beta, lambda own, space=None: table[id(own)], "space")


def measure(metric: type, given: Evaluation) -> dict[str, Measurement]:
    return {found.name: found for found in metric(metric.Config())(given)}


# --- statistics -----------------------------------------------------------------------------------------------------


def test_moments_are_numpys() -> None:
    x, weights = normal(0, 9, 4), normal(1, 9).exp()
    weights /= weights.sum()
    for given, expected in ((None, np.cov(x.T)), (weights, np.cov(x.T, aweights=weights))):
        mean, root = moments(x, given)
        np.testing.assert_allclose(root.T @ root, expected, rtol=1e-12)
        np.testing.assert_allclose(mean, np.average(x, 0, given), rtol=1e-12)


def test_frechet_distance_of_known_gaussians() -> None:
    # points whose sample means and covariances are exact: diag(1, 4) about (0, 0), diag(9, 1) about (3, 4)
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) * 0.75**0.5
    x, y = square * torch.tensor([1.0, 2.0]), square * torch.tensor([3.0, 1.0]) + torch.tensor([3.0, 4.0])
    assert frechet_distance(x, y) == pytest.approx(25 + (3 - 1) ** 2 + (2 - 1) ** 2, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(12, 12, 16), (12, 40, 16), (40, 50, 16), (5, 7, 64)])
def test_frechet_distance_is_clean_fids(n: int, m: int, d: int) -> None:
    x, y = normal(0, n, d), 1.5 * normal(1, m, d) + 0.2
    arrays = [a.numpy() for a in (x, y)]
    moment = [part for a in arrays for part in (a.mean(0), np.cov(a, rowvar=False))]
    assert frechet_distance(x, y) == pytest.approx(clean_fid.frechet_distance(*moment), rel=1e-6)


def test_kernel_distance_is_clean_fids() -> None:
    x, y = normal(0, 30, 8), normal(1, 30, 8) + 0.3
    # one subset that holds everything: clean-fid's draw is a permutation and cannot matter
    expected = clean_fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=30)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_sets_of_different_size() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0], [-1.0]])
    # kernel (xy + 1)³: within x 27; within y 1, 1 and 0; across 1, 8, 0 and 1, 27, -1
    assert kernel_distance(x, y) == pytest.approx(27 + 2 / 3 - 2 * 36 / 6)


def test_kernel_distance_is_unbiased() -> None:
    draws = torch.tensor([kernel_distance(normal(2 * i, 8, 3), normal(2 * i + 1, 8, 3)) for i in range(400)])
    assert abs(float(draws.mean())) < 4 * float(draws.std()) / 20


def test_effective_sample_size_and_log_mean_exp() -> None:
    assert float(effective_sample_size(torch.full((7,), 900.0))) == pytest.approx(7)
    assert float(effective_sample_size(torch.tensor([2.0, 1.0]).log())) == pytest.approx(9 / 5)
    assert float(log_mean_exp(torch.tensor([1.0, 3.0]).log() + 900)) == pytest.approx(900 + math.log(2), rel=1e-6)


def test_tilted_weights_keep_prompts_equal() -> None:
    groups = {"a": torch.tensor([0, 2]), "b": torch.tensor([1])}
    weights = tilted_weights(torch.tensor([0.0, 50.0, math.log(3)]), groups)
    torch.testing.assert_close(weights, torch.tensor([1 / 8, 1 / 2, 3 / 8], dtype=torch.float64))


def test_error_of_one_prompt_is_unknown() -> None:
    assert mean_and_error(torch.tensor([1.0, 3.0, 5.0])) == pytest.approx((3.0, 2 / math.sqrt(3)))
    assert mean_and_error(torch.tensor([2.0])) == (2.0, None)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_reward_is_paired_with_errors_over_noise_or_prompts() -> None:
    prompts, splits = ["a", "a", "b", "b", "c", "c"], ["train"] * 4 + ["test"] * 2
    prior = samples(torch.zeros(6), prompts, splits, other=torch.ones(6))
    finetuned = samples(torch.tensor([1.0, 3, 5, 7, 9, 9]), prompts, splits, other=torch.zeros(6))
    found = measure(RewardGain, evaluation(finetuned, prior))
    train = found["reward/train"]
    assert (train.value, train.prior, train.n, train.direction) == (4, 0, 4, "higher")
    # gains 1, 3 and 5, 7: each prompt's mean has variance 2/2, their mean (1 + 1)/4
    assert (train.difference, train.standard_error) == pytest.approx((4, 0.5**0.5))
    assert train.degrees == pytest.approx(2)  # two prompts of equal spread, one degree each
    # one held-out prompt says nothing about others
    assert (found["reward/test"].difference, found["reward/test"].standard_error) == (9, None)
    assert (found["reward/other/train"].difference, found["reward/other/train"].direction) == (-1, "none")
    assert list(found) == ["reward/train", "reward/test", "reward/other/train", "reward/other/test"]
    found = measure(RewardPrompts, evaluation(finetuned, prior))
    assert {name: (own.value, own.difference, own.standard_error) for name, own in found.items()} == {
        "reward_prompts/train/a": (2, 2, 1),  # gains 1 and 3: deviation √2, over √2
        "reward_prompts/train/b": (6, 6, 1),
        "reward_prompts/test/c": (9, 9, 0),
    }


def test_distances_to_the_prior_carry_the_floor() -> None:
    sets = [samples(torch.zeros(12)) for _ in range(4)]
    features = tuple(normal(i, 12, 16) + (i == 0) for i in range(4))
    given = evaluation(*sets, features=features)
    for metric, distance in ((FidPrior, frechet_distance), (KidPrior, kernel_distance)):
        found, least = metric(metric.Config())(given)
        assert found.name.endswith("_prior/space")
        assert found.value == pytest.approx(distance(features[0], features[2]), rel=1e-5)
        assert found.prior == pytest.approx(distance(features[1], features[2]), rel=1e-4)
        assert found.difference == pytest.approx(found.value - found.prior)
        assert found.value > found.prior
        assert least.name == f"{found.name}/floor"
        draws = [distance(features[i], features[j]) for i, j in ((1, 2), (1, 3), (2, 3))]
        assert least.value == pytest.approx(np.mean(draws), rel=1e-4)
        assert least.standard_error == pytest.approx(np.std(draws, ddof=1), rel=1e-3)
    untouched = evaluation(sets[1], *sets[1:], features=(features[1], *features[1:]))
    assert measure(FidPrior, untouched)["fid_prior/space"].difference == 0  # paired
    assert "12 images in 16 dimensions" in measure(FidPrior, given)["fid_prior/space"].note


def test_the_distance_per_prompt_is_the_mean_of_the_prompts_distances() -> None:
    sets = [samples(torch.zeros(12), ["a"] * 4 + ["b"] * 8) for _ in range(4)]
    features = tuple(normal(i, 12, 16) + (i == 0) for i in range(4))
    found = measure(FidPriorPerPrompt, evaluation(*sets, features=features))["fid_prior_per_prompt/space"]
    groups = sets[0].rows()
    assert len(groups) > 1
    own, prior = (
        np.array([frechet_distance(features[i][rows], features[2][rows]) for rows in groups.values()]) for i in (0, 1)
    )
    assert found.value == pytest.approx(own.mean())
    assert found.prior == pytest.approx(prior.mean())
    assert found.difference == pytest.approx((own - prior).mean())
    error = (own - prior).std(ddof=1) / len(groups) ** 0.5
    assert (found.standard_error, found.degrees) == pytest.approx((error, 1))
    assert f"{min(map(len, groups.values()))} images a prompt in 16 dimensions" in found.note


def test_diversities_of_a_fixed_space_ask_for_it() -> None:
    asked = []
    sets = [samples(torch.zeros(12)) for _ in range(4)]

    def features(own: Samples, space: str | None = None) -> torch.Tensor:
        asked.append(space)
        return normal(int(own is sets[0]), 12, 16)

    given = Evaluation(*sets, "main", 1.0, features, "space")
    found = measure(DiversityDreamSim, given) | measure(DiversityClip, given)
    assert set(found) == {"diversity_dreamsim/dreamsim_open_clip_vitb32", "diversity_clip/clip_vitl14"}
    assert set(asked) == {"dreamsim_open_clip_vitb32", "clip_vitl14"}
    assert all(one.value > 0 for one in found.values())


def test_diversity_and_vendi_of_identical_orthogonal_and_opposite_features() -> None:
    prompts = ["a"] * 4 + ["b"] * 4
    same, orthogonal = torch.ones(4, 4), 3 * torch.eye(4)
    opposite = torch.tensor([[1.0, 0], [-1, 0], [1.0, 0], [-1, 0]])
    own = samples(torch.zeros(8), prompts)
    prior = samples(torch.zeros(8), prompts)
    given = evaluation(own, prior, features=(torch.cat([same, same]), torch.cat([orthogonal, same])))
    found = measure(Diversity, given)["diversity/space"]
    assert (found.value, found.prior, found.difference) == pytest.approx((0, 0.5, -0.5))
    assert found.standard_error == pytest.approx(0.5)
    found = measure(Vendi, given)["vendi/space"]
    assert (found.value, found.prior) == pytest.approx((1, 2.5))
    given = evaluation(own, prior, features=(torch.cat([opposite, opposite]),) * 2)
    assert measure(Diversity, given)["diversity/space"].value == pytest.approx(4 / 3)  # 4 of 6 pairs at distance 2
    assert measure(Vendi, given)["vendi/space"].value == pytest.approx(1)  # K has rank one


def test_diversity_of_single_images_is_refused() -> None:
    own = samples(torch.zeros(2), ["a", "b"])
    found = measure(Diversity, evaluation(own, own, features=(torch.eye(2),)))["diversity/space"]
    assert found.value is None
    assert "two images" in found.note


def test_coverage_of_modes_and_of_artefacts() -> None:
    """Samples of one of two modes cover half; the mean distance to far artefacts is large, their coverage zero."""
    modes = torch.tensor([[0.0, 0], [9, 0]])
    real = normal(0, 40, 2) + modes.repeat(20, 1)
    one_mode, artefacts = normal(1, 40, 2), 40 + 9 * normal(2, 40, 2)
    covered, recalled = coverage(real, one_mode)
    assert covered[1::2].sum() == recalled[1::2].sum() == 0
    assert covered[::2].mean() > 0.9
    assert recalled[::2].mean() > 0.9
    assert coverage(real, artefacts)[0].sum() == 0
    assert coverage(real, real)[0].mean() == coverage(real, real)[1].mean() == 1
    sets = [samples(torch.zeros(40), ["a", "b"] * 20) for _ in range(4)]
    again = normal(3, 40, 2) + modes.repeat(20, 1)
    found = measure(Coverage, evaluation(*sets, features=(one_mode, again, real, again)))
    assert set(found) == {"coverage/space", "coverage/space/recall", "coverage/space/floor"}
    own = found["coverage/space"]
    assert own.value == pytest.approx(covered.mean())
    assert own.difference == pytest.approx(own.value - own.prior)
    assert own.prior > 0.9
    few = [samples(torch.zeros(4)) for _ in range(4)]
    assert measure(Coverage, evaluation(*few))["coverage/space"].value is None


def test_path_kl_of_known_numbers() -> None:
    kl = torch.tensor([[1.0, 2, 3, 4], [3.0, 2, 3, 4], [0, 0, 0, 1], [0, 0, 0, 1]])
    own = samples(torch.zeros(4), ["a", "a", "b", "b"], step_kl=kl)
    found = measure(PathKl, evaluation(own, own))
    assert {name: part.value for name, part in found.items()} == {"path_kl": 6, "path_kl/early": 2, "path_kl/late": 4}
    steps = measure(PathKlSteps, evaluation(own, own))
    assert {name: part.value for name, part in steps.items()} == {
        "path_kl_steps/01": 1,
        "path_kl_steps/02": 1,
        "path_kl_steps/03": 1.5,
        "path_kl_steps/04": 2.5,
    }
    whole = found["path_kl"]
    assert (whole.prior, whole.difference, whole.standard_error, whole.n) == pytest.approx((0, 6, 5, 4))


def test_one_prompt_has_an_error_over_its_samples() -> None:
    kl, rewards = normal(0, 50, 4).square(), normal(1, 50)
    own, prior = samples(rewards, step_kl=kl, log_ratio=-kl.sum(1)), samples(rewards - 1)
    found = measure(PathKl, evaluation(own, prior))["path_kl"]
    assert (found.value, found.degrees) == pytest.approx((float(kl.sum(1).mean()), 49))
    assert found.standard_error == pytest.approx(float(kl.sum(1).std()) / 50**0.5)
    gap = measure(TiltGap, evaluation(own, prior))["tilt_gap"]  # the reward rose by one for every sample
    assert (gap.difference, gap.degrees) == pytest.approx((found.value - 1, 49))
    assert gap.standard_error == pytest.approx(found.standard_error)


def ring(seed: int, finetuned: np.ndarray, size: int) -> Evaluation:
    """Eight modes whose reward falls with their number; of the finetuned samples `finetuned` are the shares."""
    modes, rng = torch.eye(8), np.random.default_rng(seed)
    uniform = rng.random(size)

    def draw(shares: np.ndarray, numbers: np.ndarray) -> Samples:
        chosen = torch.from_numpy(np.searchsorted(shares.cumsum()[:-1], numbers))
        return Samples(modes[chosen], [""] * size, ["train"] * size, {"main": -chosen / 4})

    prior = np.full(8, 1 / 8)
    sets = [draw(shares, numbers) for shares, numbers in ((finetuned, uniform), (prior, uniform))]
    sets += [draw(prior, rng.random(size)) for _ in range(2)]
    return Evaluation(*sets, "main", 1.0, lambda own, space=None: own.images, "points", modes)


TARGET = np.exp(-np.arange(8) / 4) / np.exp(-np.arange(8) / 4).sum()  # shares of the modes under p_# exp(βr)


@pytest.mark.parametrize("shares", [TARGET, np.eye(8)[7]])
def test_errors_of_distances_to_the_target_are_their_deviation_over_evaluations(shares: np.ndarray) -> None:
    """One model, many draws of the evaluation's noise: they scatter as far as a single evaluation says."""
    draws = [measure(TiltTv, ring(seed, shares, 512)) for seed in range(40)]
    differences, errors = np.array([(d["tilt_tv"].difference, d["tilt_tv"].standard_error) for d in draws]).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(differences.std(ddof=1), rel=0.3)
    assert {d["tilt_tv"].degrees for d in draws} == {15}


def test_the_sampling_floor_is_a_mean_over_draws_of_what_a_perfect_model_scores() -> None:
    draws = [measure(TiltTv, ring(seed, TARGET, 512)) for seed in range(60)]
    perfect = np.array([d["tilt_tv"].value for d in draws])
    floors, deviations = np.array([(d["tilt_tv/floor"].value, d["tilt_tv/floor"].standard_error) for d in draws]).T
    assert 0.98 * perfect.mean() < floors.mean() < 1.3 * perfect.mean()  # a little above: its samples are weighted
    assert floors.std() < 0.8 * perfect.std()  # a mean scatters less than one draw
    assert deviations.mean() == pytest.approx(perfect.std(), rel=0.4)


def gaussian(seed: int, shift: float, n: int) -> Samples:
    """One-step processes: prior x ~ N(0, 1), finetuned x ~ N(shift, 1), reward x; two prompts."""
    x = normal(seed, 2 * n) + shift
    kl, ratio = torch.full((2 * n, 1), shift**2 / 2), shift**2 / 2 - shift * x
    return samples(x, ["a"] * n + ["b"] * n, step_kl=kl, log_ratio=ratio)


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_tilt_gap_of_gaussians(shift: float) -> None:
    n, beta = 20_000, 1.0
    given = evaluation(gaussian(0, shift, n), *(gaussian(i, 0, n) for i in (1, 2, 3)), beta=beta)
    for found in measure(TiltGap, given).values():
        assert found.value == pytest.approx((beta - shift) ** 2 / 2, abs=0.02)
        assert found.prior == pytest.approx(beta**2 / 2, abs=0.02)
        assert found.difference == pytest.approx(shift**2 / 2 - beta * shift, abs=0.02)
        assert "effective sample size" in found.note


@pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.3), (2.0, 0.0)])
def test_within_modes_means_and_widths_are_told_apart(width: float, shift: float) -> None:
    """Right shares of modes that are too narrow, or beside their place: in deviations of the target."""
    size, std = 8000, 0.1
    modes = 3 * torch.eye(4)

    def draw(seed: int, width: float, shift: float) -> Samples:
        rng = np.random.default_rng(seed)
        chosen = torch.from_numpy(rng.integers(4, size=size))
        points = modes[chosen] + std * (width * torch.from_numpy(rng.standard_normal((size, 4))) + shift)
        return Samples(points.float(), [""] * size, ["train"] * size, {"main": torch.zeros(size)})

    sets = [draw(0, width, shift), *(draw(seed, 1.0, 0.0) for seed in (1, 2, 3))]
    given = Evaluation(*sets, "main", 1.0, lambda own, space=None: own.images, "points", modes)
    found = measure(TiltWithin, given)
    assert found["tilt_within/spread"].value == pytest.approx(abs(math.log(width)), abs=0.02)
    assert found["tilt_within/mean"].value == pytest.approx(shift, abs=0.04 * max(width, 1))
    assert found["tilt_within/spread/floor"].value < 0.02
    assert measure(TiltTv, given)["tilt_tv"].value < 0.03


def test_tilt_gap_is_refused_where_few_samples_carry_the_weight() -> None:
    given = evaluation(gaussian(0, 1, 500), *(gaussian(i, 0, 500) for i in (1, 2, 3)), beta=5.0)
    for found in measure(TiltGap, given).values():
        assert found.value is None
        assert found.prior is None
        assert "refused: smallest effective sample size" in found.note
        assert found.difference == pytest.approx(0.5 - 5, abs=0.5)


def test_metrics_of_the_process_are_refused_without_densities() -> None:
    own = samples(torch.zeros(3))
    found = measure(PathKl, evaluation(own, own)) | measure(TiltGap, evaluation(own, own))
    assert len(found) == 5
    for part in found.values():
        assert part.value is None
        assert "transition densities" in part.note


def test_fid_target_without_tilt_is_the_ordinary_distance() -> None:
    sets = [samples(normal(10 + i, 12), ["a"] * 6 + ["b"] * 6) for i in range(4)]
    features = tuple(normal(i, 12, 8) for i in range(4))
    found = measure(FidTarget, evaluation(*sets, features=features, beta=0.0))["fid_target/space"]
    pooled = torch.cat([features[2], features[3]])
    assert found.value == pytest.approx(frechet_distance(features[0], pooled), rel=1e-5)
    assert found.prior == pytest.approx(frechet_distance(features[1], pooled), rel=1e-5)
    assert found.n == 24


def test_fid_target_rests_on_the_rows_that_the_reward_selects() -> None:
    good = torch.arange(12) % 2 == 0
    sets = [samples(good.double()) for _ in range(4)]
    features = tuple(normal(i, 12, 8) for i in range(4))
    found = measure(FidTarget, evaluation(*sets, features=features, beta=1e4))["fid_target/space"]
    selected = torch.cat([features[2][good], features[3][good]])
    assert found.value == pytest.approx(frechet_distance(features[0], selected), rel=1e-5)
    assert found.n == 12


def test_fid_target_is_refused_below_the_feature_dimension() -> None:
    sets = [samples(normal(i, 12)) for i in range(4)]
    features = tuple(normal(i, 12, 8) for i in range(4))
    found = measure(FidTarget, evaluation(*sets, features=features, beta=5.0))["fid_target/space"]
    assert found.value is None
    assert found.n < 8
    assert "refused: effective sample size" in found.note


def test_the_reward_is_over_the_pairs_that_have_scores() -> None:
    """Equal to a set that never had the others; a prompt with fewer than two pairs is left out; nothing is zero."""
    prompts, splits = [*"aaaabbbbcccc"], ["train"] * 8 + ["test"] * 4
    finetuned, prior = normal(0, 12), normal(1, 12)
    finetuned[1], prior[2], prior[4], finetuned[5], prior[6] = [torch.nan] * 5  # of "b" one pair is left
    given = evaluation(samples(finetuned, prompts, splits), samples(prior, prompts, splits))
    kept = [0, 3, 8, 9, 10, 11]
    rest = evaluation(*(samples(v[kept], [*"aacccc"], ["train"] * 2 + ["test"] * 4) for v in (finetuned, prior)))
    for metric in (RewardGain, RewardPrompts):
        found, expected = measure(metric, given), measure(metric, rest)
        assert found.keys() == expected.keys()
        for name, one in found.items():
            assert vars(one) | {"note": ""} == vars(expected[name])
            assert one.note == ("" if "test" in name else one.note) and ("6 of 8 samples" in one.note) == (
                "train" in name
            )
    nothing = samples(torch.full((4,), torch.nan), [*"aabb"])
    (none,) = measure(RewardGain, evaluation(nothing, nothing)).values()
    assert none.value is None and "4 of 4 samples are left out" in none.note
