"""What an evaluation will measure, known before anything is trained: the metrics say it, on made-up samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import registry
from bench.evaluation.draw import sample_names
from bench.evaluation.target import Tilted
from bench.metric import Evaluation, Samples
from bench.models import catalogue
from bench.prompts import load_prompts
from bench.sampling.noise import generator
from bench.settings import RunConfig

SHAPE = (3, 8, 8)  # of made-up images, which are their own features: fewer numbers than any feature space has


@dataclass(frozen=True)
class Expected:
    """names: every measurement's → why it can have no value, or "". unknown: metrics that only real samples suit."""

    names: dict[str, str]
    unknown: frozenset[str]


def expected(config: RunConfig) -> Expected:
    """The measurements of a trained model, on as many samples, prompts and splits as the evaluation will have.

    The made-up model is its own prior, and its rewards hardly differ: what has no value there will have none at all.
    """
    evaluation, names, unknown = _made_up(config), dict[str, str](), set[str]()
    for name in config.evaluation.metrics:
        metric = registry.load("metrics", name)
        try:
            measured = metric(metric.Config())(evaluation)
        except Exception:  # made-up samples do not suit every plugin
            unknown.add(name)
        else:
            names |= {one.name: one.note if one.value is None else "" for one in measured}
    return Expected(names, frozenset(unknown))


def _made_up(config: RunConfig) -> Evaluation:
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    names, splits = sample_names(prompts, config.evaluation)
    sampler = config.evaluation_sampler()
    model, kernel = next(iter(catalogue.check(config.model, [sampler])), (None, None))
    points: Any = model if catalogue.draws_points(config.model.name) else None
    targets = _targets(model, names)
    density = kernel.has_density if kernel else sampler.eta > 0
    terms = getattr(registry.load("rewards", config.reward.name), "names", ())
    rewards = [config.reward.name, *terms, *config.evaluation.rewards]

    def samples(number: int) -> Samples:
        def normal(*shape: int) -> Tensor:
            drawn = generator(number, "evaluate", "made up").standard_normal((len(names), *shape), np.float32)
            return torch.from_numpy(drawn)

        images = normal(*points.latent_shape) if points else (64 * normal(*SHAPE) + 128).clamp(0, 255).byte()
        scores = dict.fromkeys(rewards, 1e-3 / config.reward.beta * normal())
        zero = torch.zeros(len(names), sampler.steps)
        records = {"step_kl": zero, "log_ratio": zero[:, 0].double()} if density else {}
        latents = torch.cat([targets[prompt].latents[i % 2 : i % 2 + 1] for prompt, i in names]) if targets else None
        prompts = [prompt for prompt, _ in names]
        return Samples(images, prompts, splits, scores, **records, output_norm=1 + zero, latents=latents)

    finetuned, reference, floor = map(samples, range(3))
    return Evaluation(
        finetuned,
        finetuned,
        reference,
        floor,
        reward=config.reward.name,
        beta=config.reward.beta,
        features=lambda samples, space=None: samples.images.flatten(1).float(),
        feature_space=config.evaluation.features,
        modes=points.modes if points else None,
        targets=targets,
        prior_on=lambda sampler, purpose: {"reference": reference, "floor": floor}[purpose],
    )


def _targets(model: Any, names: list[tuple[str, int]]) -> dict[str, Tilted] | None:
    """Those of a model with a known density, under a constant reward."""
    mixture = getattr(model, "mixture", None)
    if mixture is None:
        return None
    prompts = list(dict.fromkeys(prompt for prompt, _ in names))
    numbers = model.encode(prompts).parts["concept"].tolist()
    return {prompt: Tilted.flat(mixture, number) for prompt, number in zip(prompts, numbers, strict=True)}
