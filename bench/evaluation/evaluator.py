"""Evaluation: every method is measured on the same prompts and the same named noise."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.core import Core
from bench.environment import rounding
from bench.errors import OutOfMemoryError
from bench.evaluation.draw import draw, sample_names
from bench.evaluation.features import Features
from bench.evaluation.scores import load_reward, score_samples
from bench.evaluation.target import DRAWS, Tilted
from bench.method import Method
from bench.metric import Evaluation, Measurement, Samples
from bench.models.catalogue import make_kernel
from bench.options import paths
from bench.prompts import PromptSet
from bench.reward import Reward
from bench.runtime import memory
from bench.runtime.cache import cached
from bench.runtime.digests import digest, digest_files, source_of
from bench.sampling import noise
from bench.sampling.noise import Purpose
from bench.settings import RunConfig

SHOWN = ("images", "latents", "videos")  # what is kept of a set of prior samples
RECORDED = ("step_kl", "log_ratio", "output_norm")  # and of a finetuned model's set
log = logging.getLogger(__name__)
# set → purpose of its noise
PRIOR_SETS: dict[str, Purpose] = {"prior": "evaluate", "reference": "reference", "floor": "floor"}


class Evaluator:
    """Samples and caches the prior's sets, and measures finetuned models against them.

    cache: folder of prior sets and of features; see `bench.runtime.digests` for their keys. weights: what identifies
    those of the finetuned model, if they will not change; its set is cached then too.
    """

    def __init__(
        self,
        core: Core,
        config: RunConfig,
        prompts: PromptSet,
        cache: Path,
        method: Method | None = None,
        weights: str | None = None,
    ):
        self.core, self.config, self.cache, self.method, self.weights = core, config, cache, method, weights
        self.seed = config.seed if config.evaluation.seed is None else config.evaluation.seed
        self.names, self.splits = sample_names(prompts, config.evaluation)
        # the terms of a sum before it, so that of one that is not finite it is the term that is named
        trained = getattr(core.reward_model, "parts", {}) | {config.reward.name: core.reward_model}
        others = [name for name in config.evaluation.rewards if name not in trained]
        loaded = {name: load_reward(name, device=core.model.device) for name in others}
        for reward in loaded.values():
            reward.set_metadata(prompts.metadata)
        self.rewards: dict[str, Reward] = trained | loaded
        self.features = Features(cache, config.evaluation.features, core.model.device, core.micro_batch)
        self.prior_sets: dict[str, Samples] = {}  # by key: with their rewards, which no update of the policy changes
        self.tilted: dict[str, Tilted] = {}  # by prompt, with what their metrics have computed

    def rows(self, name: str) -> int:
        """Samples in a set; those of "target" are for all prompts together."""
        prompts = {prompt for prompt, _ in self.names}
        return DRAWS * len(prompts) if name == "target" else len(self.names)

    def evaluate(
        self, on_batch: Callable[[str, int], None] = lambda name, rows: None
    ) -> tuple[Evaluation, list[Measurement]]:
        """Draw what is not cached, then run every configured metric; on_batch gets (set, rows finished)."""
        sets = {name: self.prior_set(name, partial(on_batch, name)) for name in PRIOR_SETS}
        sets["finetuned"] = self._score("finetuned", self._finetuned(partial(on_batch, "finetuned")))
        evaluation = Evaluation(
            **sets,
            targets=self.targets(partial(on_batch, "target")),
            reward=self.config.reward.name,
            beta=self.config.reward.beta,
            features=self.features,
            feature_space=self.config.evaluation.features,
            modes=self.core.model.modes,
            prior_on=self.prior_on,
        )
        return evaluation, [m for name in self.config.evaluation.metrics for m in measure(name, evaluation)]

    def _finetuned(self, on_batch: Callable[[int], None]) -> Samples:
        """The finetuned model's set, drawn; one of weights that will not change is kept, as the prior's are."""

        def draw_set() -> dict[str, Tensor]:
            weights = None if self.config.evaluation.weights == "policy" else self.config.evaluation.weights
            drawn = draw(
                self.core,
                self.names,
                self.splits,
                seed=self.seed,
                method=self.method,
                weights=weights,
                on_batch=on_batch,
            )
            return {name: value for name in (*SHOWN, *RECORDED) if (value := getattr(drawn, name)) is not None}

        if self.weights is None:
            tensors = draw_set()
        else:
            key = {"weights": self.weights, "set": self._set_key("evaluate", self.core)}
            tensors = cached(self.cache / f"{digest(key)}.checked", draw_set)
        return Samples(prompts=[prompt for prompt, _ in self.names], splits=self.splits, rewards={}, **tensors)

    def prior_on(self, sampler: str, purpose: str) -> Samples:
        """A prior set on another sampler: the "training"'s, or the "accurate" one of 50 steps or more without noise."""
        settings = self.config.sampler
        if sampler == "accurate":
            most = max(50, settings.steps)
            settings = settings.model_copy(update={"rule": "ddim", "eta": 0.0, "steps": most})
        core = replace(self.core, kernel=make_kernel(self.core.model.spec, settings))
        return self.prior_set(purpose, core=core)

    def prior_set(
        self, name: str, on_batch: Callable[[int], None] = lambda rows: None, core: Core | None = None
    ) -> Samples:
        """One of the prior's sets ("prior", "reference", "floor"), from the cache or drawn into it; scored once a run.

        core: with another kernel than the evaluation's.
        """
        core = core or self.core
        purpose = PRIOR_SETS[name]
        key = self._set_key(purpose, core)
        if key in self.prior_sets:
            return self.prior_sets[key]
        path = self.cache / f"{key}.checked"

        def draw_set() -> dict[str, Tensor]:
            names, splits = self.names, self.splits
            drawn = draw(core, names, splits, seed=self.seed, purpose=purpose, prior=True, on_batch=on_batch)
            return {name: value for name in SHOWN if (value := getattr(drawn, name)) is not None}

        tensors = cached(path, draw_set)
        drawn = Samples(prompts=[p for p, _ in self.names], splits=self.splits, rewards={}, **tensors)
        self.prior_sets[key] = scored = self._score(name, drawn)
        return scored

    def targets(self, on_batch: Callable[[int], None] = lambda rows: None) -> dict[str, Tilted] | None:
        """Prompt → its target, from `DRAWS` samples of the prior on noise of their own.

        None without a known density, or if no configured metric asks for it.

        They are the same for every method, seed and update, and so are drawn and scored once.
        """
        mixture, reward = self.core.model.mixture, self.config.reward
        if mixture is None or not any(registry.load("metrics", name).target for name in self.config.evaluation.metrics):
            return None
        known = copy.deepcopy(mixture).cpu()
        prompts = list(dict.fromkeys(prompt for prompt, _ in self.names))
        # in an order of the run's own, so that runs that start together draw those of different prompts
        for place in noise.generator(self.seed, "select", self.config.hash()).permutation(len(prompts)):
            if (prompt := prompts[place]) in self.tilted:
                continue
            names = [(prompt, i) for i in range(DRAWS)]
            key = {"draws": self._set_key("target", self.core, names, seed=0), "reward": self._reward_key(reward.name)}

            def draw_target(names: list[tuple[str, int]] = names) -> dict[str, Tensor]:
                splits = ["target"] * DRAWS
                drawn = draw(self.core, names, splits, seed=0, purpose="target", prior=True, on_batch=on_batch)
                scored = self._score("target", drawn, {reward.name: self.core.reward_model})
                assert drawn.latents is not None
                return {"latents": drawn.latents.flatten(1), "rewards": scored.rewards[reward.name]}

            drawn = cached(self.cache / f"{digest(key)}.checked", draw_target)
            number = int(self.core.model.encode([prompt]).parts["concept"])
            self.tilted[prompt] = Tilted(known, number, drawn["latents"], reward.beta * drawn["rewards"].double())
        return {prompt: self.tilted[prompt] for prompt in prompts}

    def prior_rewards(self, prompt: str, count: int, on_batch: Callable[[int], None] = lambda rows: None) -> Tensor:
        """The training reward of `count` samples of the prior for a prompt, float32 [count].

        Their noise is that of the targets. They are drawn `sample_batch` at a time, scored by all rewards of the
        evaluation and stored, so that another reward, a larger count or another run draws them no second time.
        """
        parts = []
        for first in range(0, count, self.core.sample_batch):
            names = [(prompt, i) for i in range(first, min(count, first + self.core.sample_batch))]
            rewards = {name: self._reward_key(name) for name in sorted(self.rewards)}
            key = {"draws": self._set_key("target", self.core, names, seed=0), "rewards": rewards}

            def draw_part(names: list[tuple[str, int]] = names) -> dict[str, Tensor]:
                splits = ["target"] * len(names)
                drawn = draw(self.core, names, splits, seed=0, purpose="target", prior=True)
                return dict(self._score("target", drawn).rewards)

            parts.append(cached(self.cache / f"{digest(key)}.checked", draw_part)[self.config.reward.name])
            on_batch(len(names))
        return torch.cat(parts)

    def _reward_key(self, name: str) -> list[Any]:
        """What decides a reward's scores: code, options, their files, weights, and what it knows of prompts."""
        reward = self.rewards[name]
        files = {key: digest_files(path) for key, path in paths(reward.config)}
        weights = [need.identity() for need in reward.files]
        code = [source_of(type(part)) for part in getattr(reward, "parts", {name: reward}).values()]
        key = [name, code, reward.config.model_dump(mode="json"), files, weights, self.core.micro_batch]
        known = {prompt: dict(columns) for prompt, columns in reward.metadata.items()}
        return [*key, known] if known else key

    def _set_key(
        self, purpose: Purpose, core: Core, names: Sequence[tuple[str, int]] | None = None, seed: int | None = None
    ) -> str:
        model = self.config.model
        return digest(
            {
                "prior": core.model.fingerprint(),
                "kernel": core.kernel.key(),
                "samples": self.names if names is None else names,
                "noise": [noise.VERSION, self.seed if seed is None else seed, purpose],
                "batch": core.sample_batch,
                "execution": [model.attention, model.compile, model.vae_slicing],
                **rounding(core.model.device),
            }
        )

    def _score(self, name: str, samples: Samples, rewards: Mapping[str, Reward] | None = None) -> Samples:
        """All rewards of a set, or these; name: of the set."""
        whose = "the finetuned model's" if name == "finetuned" else "the prior's own"
        return score_samples(samples, rewards or self.rewards, self.core.micro_batch, whose)


def measure(name: str, evaluation: Evaluation) -> list[Measurement]:
    """The measurements of a metric; of one that raises, a row without a value that gives the reason."""
    try:
        with memory.phase():
            metric = registry.load("metrics", name)
            return [_without_nonfinite(one) for one in metric(metric.Config())(evaluation)]
    except OutOfMemoryError:
        raise  # the run advises what to lower, and can resume
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {error}"
        log.warning("metric %s %s; the others go on", name, reason)
        return [Measurement(name, None, direction="none", note=reason)]


def _without_nonfinite(measured: Measurement) -> Measurement:
    """The measurement with nothing in the place of NaN and infinities; of a value, its note and a warning say which."""
    names = ("value", "prior", "difference", "standard_error", "degrees")
    numbers = {name: number for name in names if (number := getattr(measured, name)) is not None}
    bad = {name: number for name, number in numbers.items() if not math.isfinite(number)}
    if which := ", ".join(f"{name} is {bad[name]}" for name in names[:3] if name in bad):
        log.warning("metric %s: its %s, and is left out", measured.name, which)
        measured = replace(measured, note=f"not finite: {which}" + f"; {measured.note}" * bool(measured.note))
    nothing: dict[str, Any] = dict.fromkeys(bad)
    return replace(measured, **nothing)
