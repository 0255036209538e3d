"""The contract of a method, checked on a Gaussian prior in float64."""

import copy
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import config as configs
from bench import registry
from bench.core import Core
from bench.diagnose.selftest.checking import Skipped, global_random_state, require
from bench.diagnose.selftest.device import device as pretended_device
from bench.diagnose.selftest.device import recording
from bench.diagnose.selftest.scaffold import (
    BETA,
    DIRECTION,
    Linear,
    Wavy,
    WavyWithoutGradient,
    gaussian_core,
    method_of,
    moments,
    parameters_of,
    perturb,
    perturb_networks,
    sample_round,
    update,
)
from bench.method import Loss, Method
from bench.reward import Reward
from bench.settings import OptimizerConfig, TrainConfig
from bench.training.trainer import Trainer


def _core(
    method: Method, reward: type[Reward] | None = None, device: torch.device | str = "cpu", steps: int = 4
) -> Core:
    """The Gaussian problem with no more than the method asks for."""
    reward = reward or (Wavy if method.needs.reward_gradient else WavyWithoutGradient)
    return gaussian_core(steps, reward, eta=1.0 if method.needs.density else 0.0, method=method, device=device)


def _moved_core(method: Method, device: torch.device | str = "cpu", steps: int = 4) -> Core:
    """The same with policy and networks away from their start."""
    core = _core(method, device=device, steps=steps)
    perturb(core.model, 0.1)
    perturb_networks(core, 0.1)
    return core


def _trained(name: str) -> Method:
    method = method_of(name, fraction=1.0)  # the project's name for a share of the transitions
    if not method.needs.training:
        raise Skipped("this method trains nothing")
    return method


def _close(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], rel: float = 1e-6) -> bool:
    same = math.isclose(ours[0], theirs[0], rel_tol=rel, abs_tol=1e-9)
    return same and all(torch.allclose(ours[1][key], g, rtol=rel, atol=1e-9) for key, g in theirs[1].items())


def says_what_it_is(name: str) -> None:
    """a docstring, and options, a recipe and a strength that are valid settings"""
    method = registry.load("methods", name)
    require((method.__doc__ or "").strip(), "the class has no docstring: say what it is.")
    configs.resolve(name, suite="gaussian")
    for value in method.strength.values if method.strength and not method.strength.relative else ():
        configs.resolve(name, suite="gaussian", assignments=[f"{method.strength.setting}={value}"])


def losses_are_well_formed(name: str) -> None:
    """finite values [n] with a gradient, metrics of one number or one a row, nothing but the declared needs used"""
    method = _trained(name)
    core = _moved_core(method)
    data, losses = sample_round(core, method), []
    for loss in method.losses(core, data):
        require(isinstance(loss, Loss), f"losses yielded {type(loss).__name__}; yield bench.Loss objects.")
        values = loss.values
        require(values.ndim == 1 and values.is_floating_point(), "Loss.values must be floating point of shape [n].")
        require(torch.isfinite(values).all(), "a loss is not finite on a bounded reward.")
        require(values.requires_grad, "Loss.values carries no gradient.")
        for key, value in loss.metrics.items():
            good = isinstance(value, Tensor) and value.ndim < 2 and not value.requires_grad
            require(good, f"metric {key!r} must be a detached tensor, scalar or [n].")
        losses.append(loss)
        values.sum().backward()
    require(losses, "losses yielded nothing.")


def gradients_reach_what_trains(name: str) -> None:
    """the adapters, where the method trains them, and every network of the method, and nothing else"""
    method = _trained(name)
    core = _moved_core(method)
    data = sample_round(core, method)
    for parameter in core.model.adapters().values():
        parameter.data += 0.01  # off the policy that sampled, so that a trust region has something to say
    _, gradients = update(core, method, data)
    parts = {"policy": list(core.model.adapters())} if method.needs.adapters else {}
    parts |= {n: [f"{n}.{key}" for key, _ in network.named_parameters()] for n, network in core.networks.items()}
    if not method.needs.adapters:
        require(not any(gradients[key].any() for key in core.model.adapters()), "a gradient reaches the adapters.")
    for part, names in parts.items():
        require(any(gradients[key].any() for key in names), f"no gradient reaches {part!r}.")
    if method.needs.trajectory:
        tensors = [getattr(data, f.name) for f in fields(data)]
        leaked = any(isinstance(value, Tensor) and (value.requires_grad or value.grad is not None) for value in tensors)
        require(not leaked, "the stored trajectory was given gradients: detach what is differentiated.")


def equal_seeds_give_equal_losses(name: str) -> None:
    """twice from scratch to the bit, without touching global random state"""
    _trained(name)
    updates, untouched = [], True
    for disturbance in (1, 2):
        torch.rand(disturbance)
        method = method_of(name, fraction=1.0)
        core = _moved_core(method)
        before = global_random_state()
        updates.append(update(core, method, sample_round(core, method)))
        untouched = untouched and global_random_state() == before
    (loss, gradients), (loss_again, gradients_again) = updates
    same = loss == loss_again and all(torch.equal(g, gradients_again[key]) for key, g in gradients.items())
    require(
        same, "two runs of one seed differ: draw every random number with bench.sampling.noise, named by the sample."
    )
    require(untouched, "global random state was used: draw with bench.sampling.noise, named by the sample.")


def batch_size_does_not_matter(name: str) -> None:
    """any micro-batch gives the same loss and gradients, and a batch's loss is the mean over its parts"""
    method = _trained(name)
    core = _moved_core(method)
    data, updates = sample_round(core, method), {}
    for size in (64, 4, 5):
        updates[size] = update(replace(core, micro_batch=size), method, data)
    alike = _close(updates[4], updates[64]) and _close(updates[5], updates[64])
    require(alike, "the loss depends on core.micro_batch: a trajectory spread over S rows adds 1/S of each, no mean.")
    if method.needs.whole_update:
        return
    parts = [(update(core, method, data[rows]), share) for rows, share in ((slice(0, 4), 4 / 6), (slice(4, 6), 2 / 6))]
    ((one, first), share), ((other, second), rest) = parts
    total = one * share + other * rest
    gradients = {key: first[key] * share + second[key] * rest for key in first}
    require(
        _close((total, gradients), updates[64]),
        "the loss of a batch is not the mean over its parts: normalise in prepare, or declare whole_update.",
    )


def equal_batches_make_equal_calls(name: str) -> None:
    """whatever the samples, a batch of one size calls the network in one order, unless the method is declared uneven"""
    if not method_of(name).needs.uneven:
        require(
            not calls_differ(name),
            "how often the network is called depends on which samples a batch holds: declare Needs(uneven=True).",
        )


def calls_differ(name: str, seeds: int = 3) -> bool:
    """Whether seeds change the calls of the network, forward and backward, in a round, an update and an evaluation."""
    return any(len({_calls(name, seed, steps) for seed in range(seeds)}) > 1 for steps in (4, 12))


def _calls(name: str, seed: int, steps: int) -> tuple[str, ...]:
    method, calls = method_of(name), list[str]()
    core = replace(_moved_core(method, steps=steps), seed=seed, micro_batch=4)

    def forward(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append("forward")
        if output.requires_grad:
            output.register_hook(lambda gradient: calls.append("backward"))

    core.model.network.register_forward_hook(forward)
    if method.needs.training:
        update(core, method, sample_round(core, method))
    with torch.no_grad():
        method.sample(core, core.batch((f"prompt {i}", 0) for i in range(6)))
    return tuple(calls)


def state_survives_storage(name: str) -> None:
    """state_dict through a file gives a fresh instance the same losses"""
    method = _trained(name)
    core = _moved_core(method)
    for _ in range(8):  # running statistics need some rounds before they count
        sample_round(core, method)
    stored = io.BytesIO()
    torch.save(method.state_dict(), stored)
    stored.seek(0)
    fresh = method_of(name, fraction=1.0)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    ours, theirs = (update(core, m, sample_round(core, m)) for m in (fresh, copy.deepcopy(method)))
    require(_close(ours, theirs, 0), "a restored instance computes other losses: state_dict must hold all state.")


def a_resumed_run_is_the_same_run(name: str) -> None:
    """eight updates, and four with four more after a restart, end in equal weights to the bit"""
    _trained(name)
    train = TrainConfig(updates=8, prompts_per_round=2, samples_per_prompt=8, checkpoint_every=1)
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for place, stops in (("straight", (8,)), ("resumed", (4, 8))):
            for stop in stops:
                method = method_of(name, fraction=1.0)
                core = _core(method)
                config = train.model_copy(update={"updates": stop})
                trainer = Trainer(core, method, ["a", "b"], config, OptimizerConfig(lr=1e-2), Path(folder) / place)
                trainer.resume()
                trainer.run(lambda record: None)
            ends.append(parameters_of(core))
    same = all(torch.equal(p, ends[1][key]) for key, p in ends[0].items())
    require(
        same, "a resumed run ends in other weights: keep what changes in state_dict, and choices named by the sample."
    )


def it_runs_on_a_device(name: str) -> None:
    """on a pretended GPU no operation mixes devices, and a micro-loss waits for it once at most"""
    method = _trained(name)
    pretended = pretended_device()
    with recording():
        core = _moved_core(method, pretended)
        data, count = sample_round(core, method), 0
        with recording() as ledger:
            for loss in method.losses(core, data):
                loss.values.sum().backward()
                count += 1
    waited = ledger.synchronisations.total()
    require(waited <= count, f"{count} micro-losses waited for the device {waited} times: {ledger.describe()}.")


def the_target_is_reached(name: str) -> None:
    """a method that declares the tilted target moves a Gaussian's mean where `p_# exp(βr)` has it, within 5 %"""
    method = _trained(name)
    if not method.tilted():
        raise Skipped("this method does not declare the target p_# exp(βr)")
    core = replace(_core(method, Linear), micro_batch=1024)
    _, prior_variance, from_start = moments(core, prior=True)
    once = {"updates_per_round": 1, "checkpoint_every": 600}
    train = TrainConfig(updates=600, prompts_per_round=1, samples_per_prompt=32, **once)
    rates = {name: {"lr": 0.1} for name in core.networks}
    optimizer = OptimizerConfig(lr=5e-3, clip=None, weight_decay=0.0, decay=0.5, networks=rates)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(core, method, ["a"], train, optimizer, Path(folder)).run(lambda record: None)
    batch = core.batch(("a", i) for i in range(4096))  # on the same noise: a shift has next to no error
    ours, prior = method.sample(core, batch).latents[:, -1], core.rollout(batch, prior=True).latents[:, -1]
    share = (ours.mean(0) - prior.mean(0)) / (BETA * DIRECTION * (prior_variance - from_start))
    text = ", ".join(f"{float(value):.2f}" for value in share)
    require((share - 1).abs().max() < 0.05, f"the mean moved by {text} of the way to the target's, per dimension.")
    ratio = ours.var(0) / prior.var(0)
    text = ", ".join(f"{float(value):.2f}" for value in ratio)
    require((ratio - 1).abs().max() < 0.05, f"the variance is {text} times the prior's; the target keeps it.")


CHECKS: list[Callable[[str], None]] = [
    says_what_it_is,
    losses_are_well_formed,
    gradients_reach_what_trains,
    equal_seeds_give_equal_losses,
    batch_size_does_not_matter,
    equal_batches_make_equal_calls,
    state_survives_storage,
    a_resumed_run_is_the_same_run,
    it_runs_on_a_device,
    the_target_is_reached,
]
