"""From a configuration to the objects of a run: the core, the evaluation's core, the method."""

from dataclasses import replace

import torch

from bench import registry
from bench.core import Core
from bench.method import Method
from bench.models.catalogue import load_model, load_teacher, make_kernel
from bench.models.precision import use_precision
from bench.prompts import metadata
from bench.runs.estimate import with_batches
from bench.runtime import processes
from bench.settings import RunConfig


def use_threads(config: RunConfig) -> None:
    """Set the configured number of CPU threads; a network on points gains nothing from a second one."""
    points = registry.load("rewards", config.reward.name).inputs == "points"
    if count := config.train.threads or (1 if points else None):
        torch.set_num_threads(count)


def build_core(config: RunConfig, device: torch.device | None = None) -> Core:
    """Model, kernel and reward of a configuration, on this process's device or another."""
    device = device or processes.state().device
    use_precision(config.model, device)
    config = with_batches(config, device, processes.count())
    model = load_model(config.model, config.sampler, device=device, seed=config.seed)
    kernel = make_kernel(model.spec, config.sampler)
    needs = build_method(config).needs
    if needs.density and needs.training:
        kernel.require_density(f"method {config.method.name!r}")
    options = config.reward.model_dump(exclude={"name", "beta"})
    reward_class = registry.load("rewards", config.reward.name)
    reward = reward_class(reward_class.Config(**options), device)
    reward.set_metadata(metadata(config.prompts.name))
    assert config.train.micro_batch and config.train.sample_batch  # `with_batches` has set them
    core = Core(
        model,
        kernel,
        reward,
        config.reward.beta,
        seed=config.seed,
        micro_batch=config.train.micro_batch,
        sample_batch=config.train.sample_batch,
        reward_name=config.reward.name,
        teacher_model=load_teacher(config.model.name, device=device) if needs.teacher else None,
    )
    core.meter.watch(model.network)
    if needs.teacher:
        core.meter.watch(core.teacher().model.network)
    return core


def evaluation_core(core: Core, config: RunConfig) -> Core:
    """The same model, reward and copies with the evaluation's own sampler and guidance."""
    sampler = config.evaluation_sampler()
    return replace(core, model=core.model.with_guidance(sampler.guidance), kernel=make_kernel(core.model.spec, sampler))


def build_method(config: RunConfig) -> Method:
    """The configured method."""
    method = registry.load("methods", config.method.name)
    return method(method.Config(**config.method.model_dump(exclude={"name"})))
