"""GARDO: advantages by diversity, the gate of the KL, and the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bench.methods.policy_gradient.flow_grpo import FlowGRPO, FlowGRPOConfig
from bench.methods.policy_gradient.gardo import GARDO, GARDOConfig, diversity
from golden_numbers import TOLERANCE, double, error, golden
from scaffold import gradients
from torch import Tensor

from bench import registry
from bench.core import Core
from bench.diagnose.selftest.scaffold import gaussian_core
from bench.sampling.trajectory import Trajectory

REWARD = "linear+0*quadratic"


def core_of(method: GARDO, reward: str = "linear") -> Core:
    core = gaussian_core(4, path="flow", method=method)
    cls = registry.load("rewards", reward)
    options = {"combine": "advantages"} if "+" in reward else {}
    core = replace(core, reward_model=cls(cls.Config(**options)))
    core.copies["reference"] = {key: p.detach() + 0.2 for key, p in core.model.adapters().items()}
    return core


def round_of(core: Core, method: GARDO, each: int = 5) -> Trajectory:
    with torch.no_grad():
        data = method.collect(core, core.batch((prompt, i) for prompt in "ab" for i in range(each)), 0)
        return replace(data, **core.rewards_and_terms(data.latents[:, -1], data.prompts))


def test_advantages_are_the_published_ones():
    """Theirs are given unit features; ours are points, whose directions alone count."""
    theirs = golden("item17_gardo")
    features, rewards = double(theirs["features"]), double(theirs["rewards"])
    method = GARDO(GARDOConfig(advantage_clip=None))
    core, prompts = core_of(method), theirs["prompts"]
    names = [(prompt, i) for i, prompt in enumerate(prompts)]
    data = Trajectory(
        prompts, names, core.model.encode(prompts), latents=torch.stack([features] * 2, 1), rewards=rewards
    )
    assert error(method.prepare(core, data).advantages[None], [theirs["advantages"]]) < TOLERANCE


def test_diversity():
    """The distance to the nearest other over the mean; a duplicate has none, and where all agree nothing is weighed."""
    angles = torch.tensor([0.0, 0.5, 1.5, 1.5], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2], [3], [4]])
    nearest = 1 - torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64).cos()
    torch.testing.assert_close(diversity(points), nearest / nearest.mean(), atol=1e-12, rtol=1e-12)
    assert torch.equal(diversity(torch.ones(3, 2)), torch.ones(3))


def test_the_gate_is_open_for_those_that_only_the_reward_likes():
    """Against sorting by hand; equal ranks everywhere are no doubt, and open it for none."""
    method = GARDO(GARDOConfig(gated=0.4))
    core = core_of(method, REWARD)
    data = round_of(core, method)
    rewards, other = data.rewards.tolist(), data.terms[:, 1].tolist()
    rank = [sum(r > mine for r in rewards) for mine in rewards]
    other_rank = [sum(r > mine for r in other) for mine in other]
    doubt = np.array(other_rank) - np.array(rank)
    threshold = np.percentile(doubt[doubt >= 0], 60)
    gate = method.prepare(core, data).weights
    assert gate.tolist() == (doubt > threshold).tolist() and 0 < gate.sum() < len(data)
    agreed = replace(data, terms=torch.stack([data.rewards, data.rewards], 1))
    assert not GARDO(GARDOConfig()).prepare(core, agreed).weights.any()
    assert GARDO(GARDOConfig()).prepare(core, replace(data, terms=None)).weights.all()


def test_the_gate_sees_no_order_among_equal_scores():
    method = GARDO(GARDOConfig(gated=0.4))
    core = core_of(method, REWARD)
    data = round_of(core, method, 8)
    data = replace(data, rewards=(data.rewards > data.rewards.median()).double())
    gate, order = GARDO(GARDOConfig()).gate(core, data), torch.arange(len(data)).flip(0)
    assert torch.equal(GARDO(GARDOConfig()).gate(core, data[order]), gate[order]) and gate.any()


def test_the_share_follows_the_doubt():
    method = GARDO(GARDOConfig(memory=2))
    shares = []
    for doubt in (5.0, 6.0, 5.5, 5.0, 5.2):  # nothing to compare with; above; between; below; between 5.5 and 5.0
        method.follow(doubt)
        shares.append(method.gated)
    assert shares == pytest.approx([0.1, 0.11, 0.11, 0.099, 0.099])
    other = GARDO(GARDOConfig(memory=2))
    other.load_state_dict(method.state_dict())
    assert (other.gated, other.doubts) == (method.gated, [5.0, 5.2])
    for doubt in range(20):
        method.follow(float(doubt))
    assert method.gated == 0.2


def gradient(core: Core, method: GARDO | FlowGRPO, data: Trajectory) -> Tensor:
    return gradients(method.losses(core, data), len(data), core.model.adapters().values())[1]


def test_the_kl_is_that_of_the_gated_samples_to_the_reference():
    """Closed, there is none; open, it is Flow-GRPO's, to the reference in the place of the prior."""
    method, plain = GARDO(GARDOConfig(kl=0.3)), GARDO(GARDOConfig(kl=0.0))
    core = core_of(method)
    data = method.prepare(core, round_of(core, method))
    for parameter in core.model.adapters().values():
        parameter.data += 0.1
    without = gradient(core, plain, data)
    assert torch.equal(gradient(core, method, replace(data, weights=torch.zeros_like(data.weights))), without)
    flow = FlowGRPO(FlowGRPOConfig(kl=0.3))
    to_prior = gradient(core, flow, data) - without
    core.copies["reference"] = {key: torch.zeros_like(p) for key, p in core.model.adapters().items()}
    torch.testing.assert_close(gradient(core, method, data) - without, to_prior)
    half = replace(data, weights=(torch.arange(len(data)) % 2).double())
    (loss,), (full,) = method.losses(core, half), method.losses(core, data)
    kl, all_kl = loss.metrics["kl"].view(3, -1), full.metrics["kl"].view(3, -1)
    assert torch.equal(kl, all_kl * half.weights)
    assert method.copies()["reference"].rounds == 16
