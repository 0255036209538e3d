"""The numbers under the metrics: errors over prompts, effective sample sizes, Fréchet and kernel distances.

Everything is computed in float64. `groups` maps a prompt to the rows of its samples (`Samples.rows()`), and prompts
count equally: statistics are taken within a prompt, then over prompts, so that an error covers the choice of prompts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.evaluation.samples import Evaluation, Samples
from bench.plugin import Measurement
from bench.sampling.noise import generator


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


def error_at_fixed_prompts(values: Tensor, groups: dict[str, Tensor]) -> float:
    """Standard error of the mean over prompts of `values` [N] when prompts are given and only the noise is a sample.

    The stratified estimate `√(Σ_g s_g²/n_g) / G`; it says nothing about other prompts.
    """
    variances = over_prompts(lambda rows: rows.var() / len(rows), values.double(), groups)
    return float(variances.sum().sqrt() / len(groups))


def paired(name: str, finetuned: Tensor, prior: Tensor, **rest: object) -> Measurement:
    """A measurement from per-prompt values [G] of both models; `rest` fills its other fields."""
    difference, error = mean_and_error(finetuned - prior)
    return Measurement(name, float(finetuned.mean()), float(prior.mean()), difference, error, **rest)


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


def target_points(evaluation: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    """The target `p_# exp(βr)` of a model of points: weighted points [N, d], [N], and as many draws as were evaluated.

    The weighted points are the two prior sets with noise of their own; the draws are resampled from the third, the
    finetuned samples' partner, which is independent of them.
    """
    sets = (evaluation.reference, evaluation.floor)

    def weights(*sets: Samples) -> Tensor:
        tilt = evaluation.beta * torch.cat([samples.rewards[evaluation.reward] for samples in sets])
        return tilted_weights(tilt, pooled_rows(*sets))

    own = weights(evaluation.prior)
    chosen = generator(0, "select", "target").choice(len(own), len(own), p=(own / own.sum()).numpy())
    draws = evaluation.prior.images[torch.from_numpy(chosen)]
    return torch.cat([samples.images for samples in sets]), weights(*sets), draws


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
