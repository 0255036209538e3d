"""The least KL at every gain of reward, from rewards of the prior's samples alone; how near to it a run comes.

For every β' ≥ 0 the tilt `p_β' ∝ p_# exp(β'r)` has the least KL to the prior of all distributions with its mean reward
(Csiszár, 1975; Donsker & Varadhan). So `β' ↦ (E_β' r − E_# r, KL(p_β'‖p_#))` is the best that any method can do. With
several prompts each is tilted by the same β', which is least for the means over prompts. A `path_kl` bounds the KL of
samples from above, so in population no run lies below the curve.

All of it is estimated from N prior samples a prompt by self-normalised importance weights, up to the gain where few of
them still count.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, gammaln, logsumexp, softmax, xlogy

from bench.errors import BenchError
from bench.renames import renamed
from bench.reporting.rows import FINGERPRINT
from bench.runtime.files import write_atomic

FILE = "frontier.json"
ENOUGH = 50  # effective samples of every prompt (Kish); where one has fewer, a curve of tilts ends
CERTAIN = 0.2  # relative standard error of its KL; where it is larger, the curve ends too
TILTS = 40  # points of the curve, evenly spread over its gains
NUMBERS = tuple(2**i for i in range(1, 9))  # of draws that are selected among, up to a quarter of the samples
SOFT = (2, 4, 8, 16, 32)  # the same, of the soft selection
SOFT_TILTS = 12
QUANTILES = 256
EVERY = "all"  # the split of all prompts together, which `path_kl` is the mean over
COLUMNS = ("split", "kind", "n", "beta", "gain", "gain_error", "kl", "kl_error", "effective")
MODEL = ("model.name", "model.dtype", "model.negative_prompt", "model.t5", FINGERPRINT)


class FrontierError(BenchError, ValueError):
    """A file that holds no curves."""


def setting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a curve, of a row's settings: prior, sampler of the evaluation, reward without β, prompts."""
    now = renamed(settings)
    own = {key: now.get(key) for key in MODEL}
    own |= {key: value for key, value in now.items() if key.startswith(("reward.", "prompts.")) or _counts(key)}
    own.pop("reward.beta", None)
    sampler = {key: value for key, value in now.items() if key.startswith("sampler.")}
    for key in sampler:
        value = now.get(f"evaluation.{key}")
        own[key] = sampler[key] if value is None else value
    return own


def _counts(key: str) -> bool:
    """Whether the setting says how many prompts of a split are evaluated."""
    return key.startswith("evaluation.") and key.endswith("_prompts")


@dataclass(frozen=True, eq=False)
class Frontier:
    """Curves of one prior and reward.

    setting: see the function of that name. samples: of each prompt. points: COLUMNS. `split` is one of the evaluation's
    or EVERY; `kind` is "tilt", "best_of_n" or "soft_best_of_n"; `beta` the tilt's β' or the soft selection's; `gain`
    and `kl` [nats] are relative to the prior. `kl_error`, of tilts, is the standard error of the KL at this gain;
    `gain_error`, of selections, that of the gain. The `kl` of a best of n is a bound. `effective`: samples (Kish), of
    the prompt that has the fewest.
    """

    setting: Mapping[str, Any]
    samples: int
    points: pd.DataFrame

    def curve(self, split: str, kind: str = "tilt", n: int | None = None) -> pd.DataFrame:
        """The points of one curve, by gain."""
        own = self.points[(self.points["split"] == split) & (self.points["kind"] == kind)]
        own = own if n is None else own[own["n"] == n]
        return own.sort_values("gain").reset_index(drop=True)

    @cached_property
    def _whole(self) -> pd.DataFrame:
        return self.curve(EVERY)

    def least(self, gain: np.ndarray) -> pd.DataFrame:
        """Of gains [N] on all prompts: `kl`, its relative standard error `error`, and the slope `beta`; else NaN.

        Between points the root of the KL is linear, which near zero it is.
        """
        curve = self._whole
        known = (gain > 0) & (gain <= curve["gain"].max())
        x = np.where(known, gain, np.nan)
        values = {"kl": np.interp(x, curve["gain"], curve["kl"] ** 0.5) ** 2}
        relative = (curve["kl_error"] / curve["kl"]).bfill()  # 0/0 at no gain
        values |= {"error": np.interp(x, curve["gain"], relative), "beta": np.interp(x, curve["gain"], curve["beta"])}
        return pd.DataFrame(values)

    def soft_kl(self, n: int, beta: float) -> float:
        """KL of the soft best of n draws at β from the prior [nats]; NaN where no curve tells."""
        curve = self.curve(EVERY, "soft_best_of_n", n).sort_values("beta")
        known = len(curve) and beta <= curve["beta"].max()
        return float(np.interp(beta, curve["beta"], curve["kl"] ** 0.5) ** 2) if known else float("nan")


def trace(rewards: Mapping[str, np.ndarray], of: Mapping[str, Any]) -> Frontier:
    """The curves of a setting. rewards: split → float [P, N], N samples of each of its prompts.

    A prompt's samples are a sample of its prior; the prompts are those of the runs, and not one.
    """
    splits = {split: np.asarray(values, dtype=float) for split, values in rewards.items() if len(values)}
    samples = next(iter(splits.values())).shape[1]
    points = [point | {"split": split} for split, values in splits.items() for point in _points(values)]
    together = points if len(splits) == 1 else _points(np.concatenate(list(splits.values())))
    points += [{**point, "split": EVERY} for point in together]
    return Frontier(of, samples, pd.DataFrame(points, columns=list(COLUMNS)))


def _points(rewards: np.ndarray) -> Iterable[dict[str, Any]]:
    rewards = np.sort(rewards, 1)
    for beta in _tilts(rewards):
        yield {"kind": "tilt", "beta": beta, **tilt(rewards, beta)}
    for n in NUMBERS:
        if 4 * n > rewards.shape[1]:
            break
        yield {"kind": "best_of_n", "n": n, **best(rewards, n)}
        if n in SOFT:
            scale = 1 / max(_spread(rewards), 1e-12)
            for beta in scale * np.geomspace(0.1, 30, SOFT_TILTS):
                yield {"kind": "soft_best_of_n", "n": n, "beta": beta, **soft(rewards, n, beta)}


def tilt(rewards: np.ndarray, beta: float) -> dict[str, float]:
    """`gain`, `kl`, its error at this gain, and `effective` samples of the tilt of rewards [P, N] by β.

    The KL at a gain is `max_β β (gain + E_# r) − log E_# exp(βr)`; by the envelope theorem a sample's influence on it
    is `β (r − E_# r) − (exp(βr) / E_# exp(βr) − 1)`, whose deviation gives the error.
    """
    logits = beta * rewards
    weights = np.exp(logits - logits.max(1, keepdims=True))
    ratio = weights / weights.mean(1, keepdims=True)
    gain = (ratio * rewards).mean(1) - rewards.mean(1)
    kl = xlogy(ratio, ratio).mean(1)
    influence = beta * (rewards - rewards.mean(1, keepdims=True)) - (ratio - 1)
    return {
        "gain": gain.mean(),
        "kl": kl.mean(),
        "kl_error": _error(influence),
        "effective": _effective(ratio),
    }


def _tilts(rewards: np.ndarray) -> np.ndarray:
    """The β' of a curve, [TILTS + 1] or 0 alone: up to where samples or certainty run out, evenly spread over gains."""
    last = _last_tilt(rewards)
    if last == 0:
        return np.zeros(1)
    tried = np.concatenate([[0.0], last * np.geomspace(1e-4, 1, 4 * TILTS)])
    gains = [tilt(rewards, beta)["gain"] for beta in tried]
    return np.interp(np.linspace(0, gains[-1], TILTS + 1), gains, tried)


def _last_tilt(rewards: np.ndarray) -> float:
    spread = _spread(rewards)
    if spread == 0:
        return 0.0
    low, high = 0.0, 1e4 / spread
    for _ in range(50):
        middle = (low + high) / 2
        point = tilt(rewards, middle)
        known = point["effective"] >= ENOUGH and point["kl_error"] <= CERTAIN * point["kl"]
        low, high = (middle, high) if known else (low, middle)
    return low


def tilt_of(rewards: np.ndarray, kl: float) -> float:
    """The β' at which the tilt of rewards [P, N] has so many nats of KL; infinite where these samples have fewer."""
    low, high = 0.0, 1e4 / max(_spread(rewards), 1e-12)
    if tilt(rewards, high)["kl"] < kl:
        return float("inf")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tilt(rewards, middle)["kl"] < kl else (low, middle)
    return low


def best(rewards: np.ndarray, n: int) -> dict[str, float]:
    """`gain`, its error, the bound `kl` (see `best_kl`) and `effective` of the best of n draws; sorted rewards [P, N].

    The gain is the mean over all subsets of n samples, without bias for n ≤ N.
    """
    count = rewards.shape[1]
    ranks = np.arange(1, count + 1)
    # C(k−1, n−1) / C(N, n), the share of subsets whose best is the k-th
    logs = gammaln(np.maximum(ranks, n)) - gammaln(np.maximum(ranks - n, 0) + 1) - gammaln(n)
    chosen = np.where(ranks < n, 0.0, np.exp(logs - gammaln(count + 1) + gammaln(n + 1) + gammaln(count - n + 1)))
    gain = rewards @ chosen - rewards.mean(1)
    # a sample among n − 1 others is kept unless one of these is above it
    below = np.arange(count + 1) / count
    above = np.cumsum((np.diff(below ** (n - 1)) * rewards)[:, ::-1], 1)[:, ::-1]
    value = rewards * below[1:] ** (n - 1) + np.pad(above, ((0, 0), (0, 1)))[:, 1:]
    effective = _effective(np.broadcast_to(chosen, rewards.shape))
    return {"gain": gain.mean(), "gain_error": _error(n * value - rewards), "kl": best_kl(n), "effective": effective}


def best_kl(n: int) -> float:
    """`log n − (n−1)/n`, nats: at most so far are the best of n samples from the prior's (Beirami et al., 2024)."""
    return float(np.log(n) - (n - 1) / n)


def soft(rewards: np.ndarray, n: int, beta: float) -> dict[str, float]:
    """`gain`, its error, `kl` and `effective` of one of n draws, taken with probability `softmax(βr)`; sorted [P, N].

    The density ratio to the prior is `g(r) = n E[e^{βr} / (e^{βr} + Σ_{j<n} e^{βr_j})]`, the KL `E_#[g log g]`. Of many
    samples `QUANTILES` stand for all, and as many draws of n − 1 of them are the others. No choice among n draws has a
    larger KL than the best.
    """
    samples = rewards.shape[1]
    if samples > QUANTILES:
        rewards = rewards[:, ((np.arange(QUANTILES) + 0.5) * samples / QUANTILES).astype(int)]
    others = np.random.default_rng(0).integers(rewards.shape[1], size=(rewards.shape[1], n - 1))
    ratios, values = np.empty_like(rewards), np.empty_like(rewards)
    for i, own in enumerate(rewards):
        drawn = own[others]
        share = expit(beta * own[:, None] - logsumexp(beta * drawn, axis=1))
        ratios[i] = share.mean(1) / share.mean()
        rest = (softmax(beta * drawn, axis=1) * drawn).sum(1)
        values[i] = (share * own[:, None] + (1 - share) * rest).mean(1)
    gain = (ratios * rewards).mean(1) - rewards.mean(1)
    return {
        "gain": gain.mean(),
        "gain_error": _error(n * values - rewards, samples),
        "kl": min(xlogy(ratios, ratios).mean(), best_kl(n)),
        "effective": _effective(ratios) * samples / rewards.shape[1],
    }


def _spread(rewards: np.ndarray) -> float:
    """Standard deviation within a prompt, pooled."""
    return float(rewards.var(1, ddof=1).mean() ** 0.5)


def _error(influence: np.ndarray, samples: int | None = None) -> float:
    """Standard error of a mean over prompts, from the influence [P, N] of samples of theirs; samples: N if others."""
    prompts, count = influence.shape
    return float((influence.var(1, ddof=1) / (samples or count)).sum() ** 0.5 / prompts)


def _effective(ratio: np.ndarray) -> float:
    """Kish's `(Σw)² / Σw²` of weights [P, N], the least of all prompts."""
    return float((ratio.sum(1) ** 2 / (ratio**2).sum(1)).min())


def write(path: Path, curves: Iterable[Frontier]) -> None:
    """Store curves; of a setting that the file holds already the new ones replace the old."""
    kept = {json.dumps(one.setting, sort_keys=True): one for one in [*(read(path) if path.is_file() else ()), *curves]}
    data = [
        {
            "setting": dict(one.setting),
            "samples": one.samples,
            "points": {name: [_number(x) for x in one.points[name]] for name in COLUMNS},
        }
        for _, one in sorted(kept.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(data, indent=None, separators=(",", ":")) + "\n").encode())


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return None if pd.isna(value) else float(f"{value:.6g}")


def read(path: Path) -> list[Frontier]:
    """The curves in a file. Raises FrontierError for one that holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf8"))
        return [
            Frontier(setting(one["setting"]), one["samples"], pd.DataFrame(one["points"])[list(COLUMNS)])
            for one in data
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise FrontierError(
            f"{path} holds no curves of this version ({error}): delete it, and make it again with bench frontier"
        ) from None


def find(rows: pd.DataFrame) -> Frontier | None:
    """The curves of a table's setting, from `frontier.json` beside its rows' files or the folders that these are in.

    Of several the one with the most samples. rows: of `bench.reporting.selection.settings`.
    """
    if "source" not in rows:  # made, not read
        return None
    wanted = setting(json.loads(rows["settings"].iloc[0]))
    folders = {Path(source).parent for source in rows["source"].unique()}
    files = sorted({place / FILE for folder in folders for place in (folder, folder.parent)})
    known = [one for file in files if file.is_file() for one in read(file) if one.setting == wanted]
    return max(known, key=lambda one: one.samples, default=None)
