"""What can be checked and fetched before a model loads. Imports little, so that a mistake is reported at once."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench import registry
from bench.errors import BenchError
from bench.hub import obtain
from bench.method import Method
from bench.model import DiffusionModel
from bench.models import catalogue
from bench.models.catalogue import draws_points, is_analytic, load_model
from bench.models.quantized import require_torchao
from bench.models.sharded import require_fully_shard
from bench.prompts import HUB, PromptSet, load_prompts
from bench.reward import score, without_column
from bench.runs.requirements import requirements
from bench.settings import RunConfig, SamplerConfig
from bench.weighted import parse


def preflight(config: RunConfig) -> PromptSet:
    """Check the configuration, fetch what is missing, and read the prompts, before a model loads. Raises BenchError."""
    check(config)
    if absent := [need for need in requirements(config) if need.missing()]:
        obtain(absent)
        check(config)  # what is here now
    return load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)


def check(config: RunConfig) -> None:
    """Whether the parts of the configuration exist and fit; nothing is fetched. Raises BenchError."""
    method_class = registry.load("methods", config.method.name)
    method = method_class(method_class.Config(**config.method.model_dump(exclude={"name"})))
    _check_method(config, method)
    _check_model(config, method)
    if (config.train.threads or 0) > (cores := os.cpu_count() or 1):
        raise BenchError(f"train.threads = {config.train.threads}: this machine has {cores} cores.")
    requirements(config)  # loads every reward, metric and feature space that is named
    _check_inputs(config)
    if config.prompts.name in HUB:
        prompts = PromptSet("", [""], [], [])
    else:
        prompts = load_prompts(config.prompts.name, rule=config.prompts.split)
    for reward in (config.reward.name, *config.evaluation.rewards):
        _check_columns(reward, prompts)


def _check_columns(reward: str, prompts: PromptSet) -> None:
    """Whether the set says of each prompt what the reward reads."""
    for column in registry.load("rewards", reward).columns:
        for prompt in prompts.all:
            if not prompts.metadata.get(prompt, {}).get(column):
                raise BenchError(f"{reward}: {without_column(column, prompt)}")


def _check_method(config: RunConfig, method: Method) -> None:
    """The method against reward, sampler and evaluation."""
    reward = registry.load("rewards", config.reward.name)
    if method.needs.reward_gradient and not reward.differentiable:
        able = [name for name, kind in _working("methods") if kind.needs.training and not kind.needs.reward_gradient]
        raise BenchError(
            f"method {config.method.name!r} needs the gradient of its reward, and {config.reward.name!r} has none: "
            f"use a differentiable reward, or one of the methods {', '.join(able)}."
        )
    if reward.may_miss and method.needs.training and not method.needs.rewards:
        able = [name for name, kind in _working("methods") if kind.needs.training and kind.needs.rewards]
        raise BenchError(
            f"method {config.method.name!r} scores within its losses, where a score must be there, and "
            f"{config.reward.name!r} may have none: use one of the methods {', '.join(able)}."
        )
    _check_few_steps(config, method)
    for name, sampler in _steered(config, method).items():
        if method.needs.density and sampler.eta == 0:
            raise BenchError(f"method {config.method.name!r} needs transition densities: use {name}.eta > 0, not 0.")
    if config.train.max_path_kl is not None:
        if not method.needs.training:
            raise BenchError(f"train.max_path_kl: method {config.method.name!r} trains nothing; leave it out.")
        if config.sampler.eta == 0:
            raise BenchError(
                "train.max_path_kl needs transition densities: use sampler.eta > 0, not 0, or leave it out."
            )
    weights = ["policy", *method.copies(), *(["ema"] if config.train.ema else [])]
    if config.evaluation.weights not in weights:
        raise BenchError(
            f"evaluation.weights = {config.evaluation.weights!r}: this run keeps {', '.join(weights)}; train.ema=0.9 "
            "keeps an 'ema' of any method's adapters."
        )
    if config.loss_guidance() != config.sampler.guidance:
        if method.needs.record or not method.needs.trajectory:
            raise BenchError(
                f"train.guidance = {config.train.guidance:g}: the loss of {config.method.name!r} is about the very "
                f"predictions of its rollouts, made with sampler.guidance = {config.sampler.guidance:g}: leave it out."
            )
        if is_analytic(config.model.name):
            raise BenchError(f"train.guidance: {config.model.name!r} knows no guidance; leave it out.")
    if config.train.ema and "ema" in method.copies():
        raise BenchError(f"train.ema: method {config.method.name!r} keeps an 'ema' of its own: leave it out.")
    if config.train.data_lag and method.needs.current:
        raise BenchError(
            f"train.data_lag = {config.train.data_lag}: the loss of {config.method.name!r} takes a copy for the "
            "policy that sampled the round, and after a lag the copy has moved: leave it out."
        )
    if config.train.ema and not method.needs.adapters:
        raise BenchError(f"train.ema averages the adapters, and {config.method.name!r} trains none: leave it out.")
    _check_combine(config, method)


def _steered(config: RunConfig, method: Method) -> dict[str, SamplerConfig]:
    """The samplers, by their settings' name, whose trajectories the method trains on or steers."""
    training, evaluation = {"sampler": config.sampler}, {"evaluation.sampler": config.evaluation_sampler()}
    if not method.needs.training:
        return evaluation
    return training if method.needs.adapters else training | evaluation


def _check_combine(config: RunConfig, method: Method) -> None:
    """The method against the way in which the terms of a weighted sum come together."""
    combine = getattr(config.reward, "combine", None)
    if combine is None:
        return
    ignored = [name for name, weight in parse(config.reward.name).items() if weight == 0]
    if ignored and combine == "rewards":
        raise BenchError(
            f"reward {config.reward.name!r} has {' and '.join(ignored)} with weight 0, which changes nothing: leave it "
            "out (evaluation.rewards measures it), or, for a method that reads such terms (gardo), set "
            "reward.combine=advantages."
        )
    if combine != "rewards" and not method.combines():
        raise BenchError(
            f"reward.combine = {combine} normalises each reward within a prompt's group, and {config.method.name!r} "
            "uses the rewards themselves or their gradient, of which only the sum is defined: leave it out, or use a "
            "method of normalised advantages, such as grpo, flow_grpo or nft."
        )
    if combine not in ("rewards", *method.combines()):
        raise BenchError(
            f"reward.combine = {combine}: method {config.method.name!r} computes its own advantages: use "
            f"{' or '.join(method.combines())}."
        )


UNFIT = {  # needs that no few-step student meets, and why
    "memoryless": "tilts sampling steps, and the first noise, which these leave as it is, decides most of a few-step "
    "student's sample",
    "denoiser": "takes the output for a mean given z, and that of a few-step student is a jump to its next noise level",
}


def _check_few_steps(config: RunConfig, method: Method) -> None:
    """The method against a few-step student, or against a model that is none."""
    student = catalogue.few_step(config.model.name)
    if method.needs.teacher and not (student and student.teacher):
        able = [name for name in catalogue.names() if (known := catalogue.few_step(name)) and known.teacher]
        raise BenchError(
            f"method {config.method.name!r} compares a few-step student with its teacher, and {config.model.name!r} "
            f"has none here: use --model {' or '.join(able)}."
        )
    for need, why in UNFIT.items():
        if student and getattr(method.needs, need):
            able = [
                name
                for name, kind in _working("methods")
                if kind.needs.training and not any(getattr(kind.needs, unmet) for unmet in UNFIT)
            ]
            teacher = f"--model {student.teacher[0]}" if student.teacher else "a model of many steps"
            raise BenchError(
                f"method {config.method.name!r} {why}: use {teacher}, or one of the methods {', '.join(able)}."
            )


def _check_model(config: RunConfig, method: Method) -> None:
    """The model against the samplers, and the method's networks on it."""
    if config.model.quantize:
        if is_analytic(config.model.name):
            raise BenchError(f"model.quantize: {config.model.name!r} has no weights to quantise; leave it out.")
        require_torchao()
    if config.model.shard:
        if is_analytic(config.model.name):
            raise BenchError(f"model.shard: {config.model.name!r} has no weights to share; leave it out.")
        require_fully_shard()
    learning = config.sampler.model_copy(update={"guidance": config.loss_guidance()})
    checked = catalogue.check(config.model, [config.sampler, config.evaluation_sampler(), learning])
    steered, users = _steered(config, method), {"sampler": "method", "evaluation.sampler": "the evaluation of"}
    for (name, user), (_, kernel) in zip(users.items(), checked, strict=False):
        if method.needs.density and name in steered:
            kernel.require_density(f"{user} {config.method.name!r}")
    for model, kernel in checked[:1]:
        if config.train.max_path_kl is not None:
            kernel.require_density("train.max_path_kl")
        config.optimizer.require_networks(_networks(method, model))
        if isinstance(model, DiffusionModel) and config.prompts.name not in HUB:  # it may know no others than its own
            prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
            model.encode(prompts.all)
    group = config.train.samples_per_prompt
    if method.needs.whole_update:
        group = -(-group // config.train.updates_per_round)  # an update takes every so many-th trajectory of a round
    for sampler in steered.values():
        if why := method.unfit(sampler.steps, group):
            raise BenchError(f"method {config.method.name!r} could do nothing: {why}.")


def _check_inputs(config: RunConfig) -> None:
    """Images or points: the model's samples against rewards and features."""
    kind = "points" if draws_points(config.model.name) else "images"
    for name in (config.reward.name, *config.evaluation.rewards):
        if (inputs := registry.load("rewards", name).inputs) != kind:
            fit = [other for other, plugin in _working("rewards") if plugin.inputs == kind]
            raise BenchError(
                f"reward {name!r} scores {inputs}, and model {config.model.name!r} makes {kind}: use a reward of "
                f"{kind} ({', '.join(fit)}), or another --model."
            )
    if (config.evaluation.features == "points") != (kind == "points"):
        raise BenchError(
            f"evaluation.features = {config.evaluation.features!r} does not fit {kind}: leave out --suite, so that "
            f"model {config.model.name!r} brings its own."
        )
    if kind == "points":  # the model costs nothing: let the reward look at a point
        reward, options = (
            registry.load("rewards", config.reward.name),
            config.reward.model_dump(exclude={"name", "beta"}),
        )
        point = torch.zeros(1, *load_model(config.model, config.sampler).latent_shape)
        score(reward(reward.Config(**options)), config.reward.name, point, [""])


def _networks(method: Method, model: Any) -> dict[str, nn.Module]:
    """The method's own networks. Raises BenchError if they cannot be built as configured."""
    try:
        return method.networks(model)
    except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise BenchError(f"the networks of the method cannot be built with {method.config!r}: {error}.") from None


def _working(kind: str) -> Iterator[tuple[str, Any]]:
    """Names and classes of the plugins that import: a broken one is no advice."""
    for name in registry.plugins(kind):
        with contextlib.suppress(BenchError):
            yield name, registry.load(kind, name)
