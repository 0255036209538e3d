"""The numbers under the metrics: errors over prompts, effective sample sizes, Fréchet and kernel distances.

Everything is computed in float64. `groups` maps a prompt to the rows of its samples (`Samples.rows()`), and prompts
count equally: statistics are taken within a prompt, then over prompts, so that an error covers the choice of prompts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.metric import Evaluation, Measurement, Samples
from bench.sampling.noise import generator

PARTS = 16  # of the samples, for errors of statistics that are no means
DIRECTIONS = 128  # of a sliced distance
FLOORS = 3  # draws of a sampling floor in one evaluation; several seeds make more


def per_prompt(values: Tensor, groups: dict[str, Tensor]) -> Tensor:
    """Mean within each prompt: `values` [N] → float64 [G]."""
    return over_prompts(torch.mean, values.double(), groups)


def over_prompts(statistic: Callable[[Tensor], Tensor], values: Tensor, groups: dict[str, Tensor]) -> Tensor:
    """A scalar statistic of each prompt's rows of `values` [N, ...] → [G]."""
    return torch.stack([statistic(values[rows]) for rows in groups.values()])


def pooled_rows(*sets: Samples) -> dict[str, Tensor]:
    """Prompt → long tensor of its rows in the concatenation of `sets`, in order of appearance."""
    groups: dict[str, Tensor] = {}
    start = 0
    for samples in sets:
        for prompt, rows in samples.rows().items():
            groups[prompt] = torch.cat([groups.get(prompt, rows[:0]), rows + start])
        start += len(samples.prompts)
    return groups


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Mean of per-prompt values [G] and its standard error; None for a single prompt, which shows no spread.

    For equally many samples a prompt this is the cluster-robust error of the mean over samples.
    """
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def error_at_fixed_prompts(values: Tensor, groups: dict[str, Tensor]) -> tuple[float, float]:
    """Standard error of the mean over prompts of `values` [N] when prompts are given and only the noise is a sample.

    The stratified estimate `√(Σ_g s_g²/n_g) / G`, and its degrees of freedom (Satterthwaite, 1946); it says nothing
    about other prompts. Every prompt needs two samples.
    """
    variances = over_prompts(lambda rows: rows.var() / len(rows), values.double(), groups)
    fewer = torch.tensor([len(rows) - 1 for rows in groups.values()], dtype=torch.float64)
    total, spread = variances.sum(), (variances.square() / fewer).sum()
    degrees = total.square() / spread if spread else fewer.sum()
    return float(total.sqrt() / len(groups)), float(degrees)


def paired(name: str, finetuned: Tensor, prior: Tensor, **rest: Any) -> Measurement:
    """A measurement from per-prompt values [G] of both models; `rest` fills its other fields."""
    difference, error = mean_and_error(finetuned - prior)
    degrees = None if error is None else len(finetuned) - 1
    return Measurement(name, float(finetuned.mean()), float(prior.mean()), difference, error, degrees, **rest)


def paired_samples(name: str, finetuned: Tensor, prior: Tensor, groups: dict[str, Tensor], **rest: Any) -> Measurement:
    """A measurement from the samples' values [N] of both models, averaged within prompts.

    Its error is over prompts; where there is one prompt, over that prompt's samples.
    """
    measurement = paired(name, per_prompt(finetuned, groups), per_prompt(prior, groups), **rest)
    if len(groups) > 1:
        return measurement
    _, error = mean_and_error((finetuned - prior).double())
    return replace(measurement, standard_error=error, degrees=None if error is None else len(finetuned) - 1)


def error_over_parts(statistic: Callable[[slice], float], size: int) -> tuple[float | None, float | None]:
    """Standard error, and its degrees of freedom, of a statistic of `size` samples that is no mean.

    statistic: of the samples that a slice picks. Its deviation over `PARTS` disjoint parts, over √PARTS: right for
    what scatters as 1/√n, near zero too, where resampling is not. None, None for fewer than two samples a part.
    """
    if size < 2 * PARTS:
        return None, None
    values = torch.tensor([statistic(slice(i, None, PARTS)) for i in range(PARTS)], dtype=torch.float64)
    return float(values.std() / math.sqrt(PARTS)), PARTS - 1


def log_mean_exp(values: Tensor) -> Tensor:
    """`log (1/n) Σ exp(v)` of `values` [n], scalar."""
    return torch.logsumexp(values, 0) - math.log(len(values))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Kish's `(Σw)² / Σw²` of log-weights [n], scalar between 1 and n; rounded, so that n equal weights count n."""
    return (1 / torch.softmax(log_weights.double(), 0).square().sum()).round(decimals=6)


def tilted_weights(log_weights: Tensor, groups: dict[str, Tensor]) -> Tensor:
    """Weights [N] that sum to one, proportional to `exp(log_weights)` within each prompt, prompts equal."""
    weights = torch.zeros(len(log_weights), dtype=torch.float64)
    for rows in groups.values():
        weights[rows] = torch.softmax(log_weights[rows].double(), 0) / len(groups)
    return weights


def target_points(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """The target `p_# exp(βr)` of a model of points as weighted points [2N, d], [2N] that sum to one.

    They are the two prior sets with noise of their own, independent of the finetuned samples.
    """
    sets = (evaluation.reference, evaluation.floor)
    tilt = evaluation.beta * torch.cat([samples.rewards[evaluation.reward] for samples in sets])
    return torch.cat([samples.images for samples in sets]), tilted_weights(tilt, pooled_rows(*sets))


def target_draws(evaluation: Evaluation, count: int = FLOORS) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a perfect model would show, `count` times: draws of the target [N, d], weighted points [2N, d], [2N].

    Each time the 3N samples of the prior are cut at random into a part from which N draws are resampled
    (systematically, Kitagawa, 1996) and a part that is the weighted target, as two independent sets would be. N
    weighted samples know the target less well than N draws of it, so a distance between the two is a little too large.
    """
    sets = (evaluation.prior, evaluation.reference, evaluation.floor)
    points = torch.cat([samples.images for samples in sets])
    tilt = evaluation.beta * torch.cat([samples.rewards[evaluation.reward] for samples in sets]).double()
    size = len(evaluation.prior.images)
    for number in range(count):
        rng = generator(0, "select", "target", step=number)
        order = torch.from_numpy(rng.permutation(len(points)))
        drawn, rest = order[:size], order[size:]
        places = (rng.random() + torch.arange(size, dtype=torch.float64)) / size
        chosen = torch.searchsorted(torch.softmax(tilt[drawn], 0).cumsum(0), places).clamp(max=size - 1)
        yield points[drawn[chosen]], points[rest], torch.softmax(tilt[rest], 0)


def distance_to_target(
    name: str, evaluation: Evaluation, distance: Callable[[Tensor, Tensor, Tensor], float], **rest: Any
) -> list[Measurement]:
    """A distance to the target of a model of points, with an error over samples, and its floor.

    distance: of points [n, d] to points [m, d] with weights [m], which need not sum to one.
    """
    points, weights = target_points(evaluation)
    finetuned, prior = evaluation.finetuned.images, evaluation.prior.images

    def gain(part: slice) -> float:
        target = points[part], weights[part]
        return distance(finetuned[part], *target) - distance(prior[part], *target)

    n = len(finetuned)
    error, degrees = error_over_parts(gain, n)
    value, before = (distance(samples, points, weights) for samples in (finetuned, prior))
    return [
        Measurement(name, value, before, value - before, error, degrees, n=n, **rest),
        floor(name, (distance(*draw) for draw in target_draws(evaluation)), n=n),
    ]


def centre_error(groups: Sequence[tuple[int, Tensor]], centres: Tensor) -> float:
    """Root mean square, over samples and dimensions, of their means' distance to the centres [J, R] of their modes.

    groups: modes that have samples, each with these samples' coordinates [n, R].
    """
    squares = sum(len(own) * float((own.mean(0) - centres[j]).square().mean()) for j, own in groups)
    return math.sqrt(squares / sum(len(own) for _, own in groups))


def spread_error(groups: Sequence[tuple[int, Tensor]], deviations: Tensor) -> float:
    """`|½ log|` of the samples' variance around their own means over that of the deviations [J, R], pooled over modes.

    0 for the right width, 0.7 for half or double of it; infinite without two samples of a mode. groups: see above.
    """
    groups = [(j, own) for j, own in groups if len(own) > 1]
    found = sum(float((own - own.mean(0)).square().sum()) for _, own in groups)
    wanted = sum((len(own) - 1) * float(deviations[j].square().sum()) for j, own in groups)
    return abs(math.log(found / wanted)) / 2 if found and wanted else math.inf


def random_directions(dimensions: int) -> Tensor:
    """Unit vectors for `sliced_distance`, the same in every call: float64 [DIRECTIONS, d]."""
    rng = generator(0, "select", "directions")
    directions = torch.from_numpy(rng.standard_normal((dimensions, DIRECTIONS)))
    return (directions / directions.norm(dim=0)).T.contiguous()


def sliced_distance(x: Tensor, points: Tensor, weights: Tensor, directions: Tensor) -> float:
    """Sliced 2-Wasserstein distance (Rabin et al., 2011) of `x` [n, d] to `points` [m, d] with weights [m].

    `(mean over directions of W₂² of the projections)^½`; directions: unit vectors [L, d]. Weights need not sum to one.
    """
    target, order = (directions @ points.double().T).sort(1)
    projected = torch.from_numpy(np.sort((directions @ x.double().T).numpy(), 1))  # ten times as fast as torch's
    levels = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x) * weights.sum()
    place = torch.searchsorted(weights[order].cumsum(1), levels.repeat(len(directions), 1))
    quantiles = target.gather(1, place.clamp(max=len(points) - 1))
    return math.sqrt(float((projected - quantiles).square().mean()))


def floor(name: str, draws: Iterable[float], **rest: Any) -> Measurement:
    """`<name>/floor`: the mean over draws of what a perfect model would score, and as its error their deviation."""
    values = torch.tensor(list(draws), dtype=torch.float64)
    error, degrees = float(values.std()), len(values) - 1
    note = f"mean and deviation of {len(values)} draws"
    fields: dict[str, Any] = {"standard_error": error, "degrees": degrees, "direction": "none", "note": note}
    return Measurement(f"{name}/floor", float(values.mean()), **fields, **rest)


def prior_pairs(evaluation: Evaluation) -> list[tuple[Samples, Samples]]:
    """The pairs of prior sets, each on noise of its own: distances within them are draws of a floor."""
    return list(combinations((evaluation.prior, evaluation.reference, evaluation.floor), 2))


def distance_to_prior(
    name: str, evaluation: Evaluation, distance: Callable[[Samples, Samples], float], **rest: Any
) -> list[Measurement]:
    """A distance of the finetuned samples, and of the prior's on the same noise, to the prior's reference set; a floor.

    The reference has noise of its own: on shared noise a hardly changed model would score zero at any n.
    """
    value, prior = (distance(one, evaluation.reference) for one in (evaluation.finetuned, evaluation.prior))
    n = len(evaluation.reference.images)
    return [
        Measurement(name, value, prior, value - prior, n=n, **rest),
        floor(name, (distance(*pair) for pair in prior_pairs(evaluation)), n=n),
    ]


def moments(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [d] of `features` [n, d] and a root [n, d] of their unbiased covariance `rootᵀ root`.

    weights: [n], summing to one; None counts all rows equally, which gives the usual n − 1.
    """
    features = features.double()
    if weights is None:
        weights = features.new_full((len(features),), 1 / len(features))
    mean = weights @ features
    scale = weights / (1 - weights.square().sum())
    return mean, scale.sqrt()[:, None] * (features - mean)


def frechet_distance(x: Tensor, y: Tensor, weights: Tensor | None = None) -> float:
    """Fréchet distance between Gaussians fitted to `x` [n, d] and `y` [m, d]; `weights` [m] belong to `y`.

    `|m₁−m₂|² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁Σ₂)` (Heusel et al., 2017). With enough samples the last term is clean-fid's
    own matrix root; with fewer samples than dimensions it is the nuclear norm of the product of the covariances'
    roots: the same number, thousands of times faster, and stable where the covariance is singular.
    """
    (mean_x, root_x), (mean_y, root_y) = moments(x), moments(y, weights)
    if min(len(x), len(y)) >= x.shape[1]:
        from cleanfid.fid import frechet_distance as clean_fid  # seconds to import

        arrays = (mean_x, root_x.T @ root_x, mean_y, root_y.T @ root_y)
        return float(clean_fid(*(array.cpu().numpy() for array in arrays)))
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD between `x` [n, d] and `y` [m, d] for the kernel `(x·y/d + 1)³` (Bińkowski et al., 2018).

    All pairs are used, so nothing is drawn at random. It may be negative.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / x.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
