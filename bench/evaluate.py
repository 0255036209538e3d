"""Evaluation: the same prompts and the same named noise for every method, and what the metrics see of it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor

from bench import registry
from bench.checkpoint import write_atomic
from bench.core import Core, NonFiniteError
from bench.errors import BenchError
from bench.plugin import Measurement, Method, Reward
from bench.prompts import PromptSet
from bench.trajectory import Trajectory

if TYPE_CHECKING:
    from bench.config import EvaluationConfig, RunConfig

PRIOR_SETS = {"prior": "evaluate", "reference": "reference", "floor": "floor"}  # set → purpose of its noise


@dataclass(frozen=True)
class Samples:
    """Images of one model, with what was recorded while sampling. Rows of one prompt are consecutive.

    images: uint8 [N, 3, H, W], or float32 points [N, d] of an analytic model.
    prompts: N strings; splits: N times "train" or "heldout".
    rewards: reward name → float32 [N].
    step_kl: [N, K] nats, `‖μ_θ−μ_#‖² / 2σ_k²` at the sampled states, or None (a kernel without densities).
    log_ratio: [N] nats, `log P_#(path) / P_θ(path)`, or None.
    """

    images: Tensor
    prompts: list[str]
    splits: list[str]
    rewards: dict[str, Tensor]
    step_kl: Tensor | None = None
    log_ratio: Tensor | None = None

    def rows(self, split: str | None = None) -> dict[str, Tensor]:
        """Prompt → long tensor of its rows, in order of appearance; one split or all."""
        groups: dict[str, list[int]] = {}
        for i, (prompt, own) in enumerate(zip(self.prompts, self.splits, strict=True)):
            if split in (None, own):
                groups.setdefault(prompt, []).append(i)
        return {prompt: torch.tensor(rows) for prompt, rows in groups.items()}


@dataclass(frozen=True)
class Evaluation:
    """What a metric may look at.

    finetuned, prior: same prompts, same noise (paired); reference, floor: two further prior sets, each on noise of its
    own (unpaired), same prompts. reward: name of the reward that was trained on; beta: its inverse temperature.
    features: `Samples → float32 [N, d]`, computed once per set; feature_space: its name.
    modes: [M, d], centres of the prior's modes where the model knows them.
    """

    finetuned: Samples
    prior: Samples
    reference: Samples
    floor: Samples
    reward: str
    beta: float
    features: Callable[[Samples], Tensor]
    feature_space: str
    modes: Tensor | None = None


def sample_names(prompts: PromptSet, config: EvaluationConfig) -> tuple[list[tuple[str, int]], list[str]]:
    """Names of the evaluation samples, rows of one prompt consecutive, and the split of each row."""
    chosen = [(p, "train") for p in prompts.train[: config.train_prompts]]
    chosen += [(p, "heldout") for p in prompts.heldout[: config.heldout_prompts]]
    names = [(prompt, i) for prompt, _ in chosen for i in range(config.samples_per_prompt)]
    return names, [split for _, split in chosen for _ in range(config.samples_per_prompt)]


def draw(
    core: Core,
    names: list[tuple[str, int]],
    splits: list[str],
    *,
    seed: int,
    purpose: str = "evaluate",
    prior: bool = False,
    method: Method | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Samples:
    """Sample, decode and keep images; for a finetuned model with densities also its divergence from the prior.

    method: whose `sample` draws, if it has a say in it. on_batch: called with the number of rows finished.
    """
    sample = functools.partial(method.sample, core) if method and not prior else core.rollout
    records = frozenset() if prior or not core.kernel.has_density else frozenset({"model_output", "prior_output"})
    images, kls, ratios = [], [], []
    for part in core.batch(names).split(core.sample_batch):
        with torch.no_grad():
            path = sample(part, purpose=purpose, seed=seed, record=records, prior=prior)
            image = core.model.decode(path.latents[:, -1])
        if not bool(torch.isfinite(image).all()):
            raise NonFiniteError("the samples are not finite: lower optimizer.lr or reward.beta.")
        images.append((image * 255).round().to("cpu", torch.uint8) if image.ndim == 4 else image.cpu())
        if path.model_output is not None:
            kl, ratio = _divergence(core, path)
            kls.append(kl.cpu())
            ratios.append(ratio.cpu())
        on_batch(len(part))
    return Samples(
        images=torch.cat(images).contiguous(),
        prompts=[prompt for prompt, _ in names],
        splits=splits,
        rewards={},
        step_kl=torch.cat(kls) if kls else None,
        log_ratio=torch.cat(ratios) if ratios else None,
    )


def _divergence(core: Core, path: Trajectory) -> tuple[Tensor, Tensor]:
    """`‖μ_θ−μ_#‖²/2σ_k²` [B, K] and `log P_#/P_θ` of the path [B], summed in float64."""
    kl, ratio = [], torch.zeros(len(path), dtype=torch.float64, device=path.latents.device)
    for k in range(path.steps):
        z, z_next = path.latents[:, k], path.latents[:, k + 1]
        mean, base = (core.kernel.mean(z, eps[:, k], k) for eps in (path.model_output, path.prior_output))
        variance = core.kernel.std(k, z) ** 2
        kl.append(((mean - base) ** 2 / (2 * variance)).flatten(1).sum(1))
        step = ((z_next - mean) ** 2 - (z_next - base) ** 2) / (2 * variance)
        ratio += step.flatten(1).sum(1, dtype=torch.float64)
    return torch.stack(kl, 1), ratio


class Evaluator:
    """Draws and caches the prior's sets, and measures finetuned models against them.

    cache: folder of prior sets and their features, keyed by the contents of everything that they depend on.
    """

    def __init__(self, core: Core, config: RunConfig, prompts: PromptSet, cache: Path, method: Method | None = None):
        self.core, self.config, self.cache, self.method = core, config, cache, method
        self.names, self.splits = sample_names(prompts, config.evaluation)
        own = {config.reward.name: core.reward_model}
        checks = [name for name in config.evaluation.rewards if name not in own]
        self.rewards: dict[str, Reward] = own | {name: load_reward(name, device=core.model.device) for name in checks}
        self.extract = load_features(config.evaluation.features, core.model.device)

    @property
    def rows(self) -> int:
        """Samples in each of the sets."""
        return len(self.names)

    def evaluate(
        self, on_batch: Callable[[str, int], None] = lambda name, rows: None
    ) -> tuple[Evaluation, list[Measurement]]:
        """Draw what is not cached, then run every configured metric; on_batch gets (set, rows finished)."""
        sets = {name: self.prior_set(name, lambda rows, name=name: on_batch(name, rows)) for name in PRIOR_SETS}
        sets["finetuned"] = self._score(
            draw(
                self.core,
                self.names,
                self.splits,
                seed=self.config.evaluation.seed,
                method=self.method,
                on_batch=lambda rows: on_batch("finetuned", rows),
            )
        )
        evaluation = Evaluation(
            **sets,
            reward=self.config.reward.name,
            beta=self.config.reward.beta,
            features=self.features,
            feature_space=self.config.evaluation.features,
            modes=self.core.model.modes,
        )
        metrics = [registry.load("metrics", name) for name in self.config.evaluation.metrics]
        return evaluation, [m for metric in metrics for m in metric(metric.Config())(evaluation)]

    def prior_set(self, name: str, on_batch: Callable[[int], None] = lambda rows: None) -> Samples:
        """One of the prior's sets ("prior", "reference", "floor"), from the cache or drawn into it."""
        seed, purpose = self.config.evaluation.seed, PRIOR_SETS[name]
        path = self.cache / f"{self._key(purpose)}.safetensors"
        if not path.is_file():
            drawn = draw(self.core, self.names, self.splits, seed=seed, purpose=purpose, prior=True, on_batch=on_batch)
            write_atomic(path, save({"images": drawn.images}))
        images = load(path.read_bytes())["images"]
        return self._score(Samples(images, [prompt for prompt, _ in self.names], self.splits, {}))

    def _key(self, purpose: str) -> str:
        kernel, model = self.core.kernel, self.core.model
        parts = [model.fingerprint(), kernel.alphas.tolist(), kernel.eta, kernel.timesteps.tolist(), self.names]
        parts += [self.config.evaluation.seed, purpose, self.core.sample_batch, torch.__version__, str(model.device)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def _score(self, samples: Samples) -> Samples:
        """All rewards of the 8-bit images, so that every set is scored on what is shown."""
        scores: dict[str, list[Tensor]] = {name: [] for name in self.rewards}
        for start in range(0, len(samples.images), self.core.micro_batch):
            rows = slice(start, start + self.core.micro_batch)
            images = as_seen(samples.images[rows].to(self.core.model.device))
            for name, reward in self.rewards.items():
                with torch.no_grad():
                    scores[name].append(reward(images, samples.prompts[rows]).cpu())
        return replace(samples, rewards={name: torch.cat(values) for name, values in scores.items()})

    def features(self, samples: Samples) -> Tensor:
        """Features of a set, float32 [N, d], cached by the images' contents."""
        digest = hashlib.blake2b(samples.images.numpy().tobytes(), digest_size=16).hexdigest()
        path = self.cache / f"{digest}-{self.config.evaluation.features}.safetensors"
        if not path.is_file():
            parts = samples.images.split(self.core.micro_batch)
            with torch.no_grad():
                found = torch.cat([self.extract(as_seen(p.to(self.core.model.device))).cpu() for p in parts])
            write_atomic(path, save({"features": found}))
        return load(path.read_bytes())["features"]


def as_seen(images: Tensor) -> Tensor:
    """What rewards and feature spaces take: uint8 images as float32 in [0, 1]; points as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def load_reward(name: str, options: dict | None = None, device: torch.device | str = "cpu") -> Reward:
    """A reward by name with its own default options or those given."""
    reward = registry.load("rewards", name)
    return reward(reward.Config(**(options or {})), device)


def load_features(name: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """A feature extractor, images float32 [B, 3, H, W] in [0, 1] → [B, d]; "points" takes points as they are.

    Raises BenchError for an unknown space.
    """
    if name == "points":
        return lambda points: points
    from bench.features import EfficientNetLite0

    if name != EfficientNetLite0.name:
        raise BenchError(
            f"unknown feature space evaluation.features={name!r}. Known: {EfficientNetLite0.name}, points."
        )
    return EfficientNetLite0(device)


def cache_folder() -> Path:
    """Where prior samples and features are kept between runs: `$XDG_CACHE_HOME/nabla-bench`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nabla-bench"
