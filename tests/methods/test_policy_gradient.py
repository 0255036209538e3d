"""Policy gradients on a flow whose law is known: surrogates, KL terms, advantages, windows, shared starts."""

from dataclasses import replace

import pytest
import torch
from bench.rewards.linear import Linear
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from bench import registry
from bench.config import resolve
from bench.core import Core
from bench.method import NFE, Method
from bench.models.analytic import GaussianFlowModel
from bench.sampling.grids import flow_kernel
from bench.sampling.trajectory import Trajectory, Transitions
from bench.training.advantages import group_normalised

FLOW = ("flow_grpo", "flow_grpo_cps", "dance_grpo", "mix_grpo", "grpo_guard", "flow_dppo")
EVERY = ("ddpo", "grpo", "dpok", *FLOW)
RULES = {"flow_grpo_cps": ("cps", 0.7), "dance_grpo": ("dance", 0.3)}
D = 2  # latent elements


def method_of(name: str, **options: object) -> Method:
    found = registry.load("methods", name)
    return found(found.Config(**options))


def core_of(name: str) -> Core:
    model = GaussianFlowModel(D, (0.7, -0.2), 0.6, dtype=torch.float64)
    rule, eta = RULES.get(name, ("euler", 0.7))
    core = Core(model, flow_kernel(6, rule=rule, eta=eta, dtype=torch.float64), Linear(Linear.Config()), 1.5)
    model.adapters()["bias"].data[:] = 0.1
    return core


def data_of(core: Core, method: Method, number: int = 0) -> Trajectory:
    batch = core.batch((prompt, i) for prompt in "ab" for i in range(4))
    with torch.no_grad():
        data = method.collect(core, batch, number)
    return method.prepare(core, replace(data, rewards=core.reward(data.latents[:, -1], data.prompts).detach()))


def gradient(core: Core, method: Method, data: Trajectory) -> Tensor:
    bias = core.model.adapters()["bias"]
    bias.grad = None
    sum(loss.values.sum() for loss in method.losses(core, data)).backward()
    return bias.grad


# The losses, far from the policy that sampled ---------------------------------------------------------------------


def steps_of(core: Core, part: Transitions, old: Tensor) -> tuple[Normal, Normal, Normal]:
    """The steps of the policy, of the one that sampled (its bias `old`) and of the prior, as distributions."""
    bias, std = core.model.adapters()["bias"], core.kernel.std(part.k, part.z)

    def normal(**options: bool) -> Normal:
        return Normal(core.kernel.mean(part.z, core.predict(part.z, part.k, part.conditioning, **options), part.k), std)

    policy, prior, now = normal(), normal(prior=True), bias.data.clone()
    bias.data[:] = old
    with torch.no_grad():
        sampled = normal()
    bias.data[:] = now
    return policy, sampled, prior


def expected(
    name: str, core: Core, part: Transitions, old: Tensor, limit: float, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each transition as the paper has it, and what is logged of it.

    limit: of the ratio's range, or of Flow-DPPO's divergence.
    """
    policy, sampled, prior = steps_of(core, part, old)
    a, std = part.advantages, core.kernel.std(part.k, part.z)[:, 0]
    log_ratio = (policy.log_prob(part.z_next) - sampled.log_prob(part.z_next)).mean(1)
    kl_old, kl = kl_divergence(policy, sampled).mean(1), kl_divergence(policy, prior).mean(1)
    decrease = (core.kernel.sigmas[:-1] - core.kernel.sigmas[1:])[part.k]
    match name:
        case "dpok":
            log_ratio, kl = D * log_ratio, D * kl
        case "flow_grpo":
            kl = kl * decrease
        case "flow_grpo_cps":
            log_ratio, kl = 2 * std**2 * log_ratio, 2 * std**2 * kl
        case "grpo_guard":
            log_ratio = (log_ratio + kl_old) * std
    ratio = log_ratio.exp()
    if name == "flow_dppo":
        outside = (kl_old >= limit) & (a * (ratio - 1) > 0)
        loss = torch.where(outside, torch.zeros_like(a), -a * ratio)
    else:
        outside = (ratio > 1 + limit) | (ratio < 1 - limit)
        loss = -torch.minimum(a * ratio, a * ratio.clamp(1 - limit, 1 + limit))
    if name == "grpo_guard":
        loss = loss / decrease
    metrics = {"clipped": outside.float(), "log_ratio": log_ratio} | ({"kl": kl} if weight else {})
    return loss + weight * kl, metrics


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("name", EVERY)
def test_losses_are_the_papers(name, weight):
    """Values and gradients, with ratios on both sides of the range for advantages of both signs."""
    core = core_of(name)
    bias = core.model.adapters()["bias"]
    old = bias.data.clone()
    option, limit = ("threshold", 1e-3) if name == "flow_dppo" else ("clip", 5e-3)
    method = method_of(name, kl=weight, advantage_clip=None, **{option: limit})
    data = data_of(core, method)
    generator = torch.Generator().manual_seed(1)
    data = replace(data, advantages=torch.randn(8, generator=generator, dtype=torch.float64))
    bias.data += 0.1 * torch.randn(bias.shape, generator=generator, dtype=torch.float64)
    steps = method.steps(core, data)
    (part,) = data.transitions(steps, 64)
    theirs, metrics = expected(name, core, part, old, limit, weight)
    (slope,) = torch.autograd.grad(theirs.sum() / steps.shape[1], bias)
    (loss,) = method.losses(core, data)
    torch.testing.assert_close(loss.values, theirs / steps.shape[1])
    torch.testing.assert_close(gradient(core, method, data), slope)
    outside = loss.metrics["clipped"] == 1
    for sign in (-1, 1):
        assert (outside & (sign * part.advantages > 0)).any()
        assert (~outside & (sign * part.advantages > 0)).any()
    assert loss.metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        torch.testing.assert_close(loss.metrics[key], value.detach())


@pytest.mark.parametrize("name", EVERY)
def test_on_policy_ratios_are_one_and_a_divergence_changes_the_gradient(name):
    core, slopes = core_of(name), []
    for weight in (0.0, 1.0):
        method = method_of(name, kl=weight, advantage_clip=1.0)
        data = data_of(core, method)
        for loss in method.losses(core, data):
            rounding = 0 if name in FLOW else 1e-6  # a rollout of float64 starts with noise in float32
            assert loss.metrics["log_ratio"].abs().max() <= rounding
            assert not loss.metrics["clipped"].any()
        slopes.append(gradient(core, method, data))
    assert slopes[0].any()
    assert (slopes[0] - slopes[1]).norm() > 1e-3 * slopes[0].norm()


def test_published_options():
    """Clip range (Flow-DPPO: threshold), KL weight, largest advantage, and what an evaluation samples with."""
    assert method_of("mix_grpo").config.window_rounds == 25
    published = {}
    for name in EVERY:
        config = resolve(name, suite="gaussian")
        limit = config.method.threshold if name == "flow_dppo" else config.method.clip
        published[name] = limit, config.method.kl, config.method.advantage_clip, config.evaluation.weights
    assert published == {
        "ddpo": (1e-4, 0, 5, "policy"),
        "grpo": (1e-4, 0, 5, "policy"),
        "dpok": (0.2, 1, None, "policy"),
        "flow_grpo": (1e-4, 0.04, 5, "ema"),
        "flow_grpo_cps": (1e-4, 0.004, 5, "policy"),
        "dance_grpo": (1e-4, 0, 5, "policy"),
        "mix_grpo": (1e-4, 0, 5, "policy"),
        "grpo_guard": (2e-6, 0, 5, "policy"),
        "flow_dppo": (1e-5, 0, None, "policy"),
    }


# Advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_advantages_are_the_papers(name):
    core = core_of(name)
    data = data_of(core, method_of(name, advantage_clip=None))
    rewards = data.rewards.view(2, 4)
    centred, whole = rewards - rewards.mean(1, keepdim=True), data.rewards.std(correction=0)
    theirs = {
        "ddpo": (rewards - rewards.mean()) / (whole + 1e-6),  # its buffers hold too few yet
        "grpo": centred / (rewards.std(1, keepdim=True, correction=0) + 1e-6),
        "dpok": 1.5 * (rewards - (rewards.sum(1, keepdim=True) - rewards) / 3),
        "dance_grpo": centred / (rewards.std(1, keepdim=True) + 1e-8),
        "mix_grpo": centred / (rewards.std(1, keepdim=True) + 1e-8),
    }.get(name, centred / (whole + 1e-4))
    torch.testing.assert_close(data.advantages, theirs.flatten(), rtol=1e-6, atol=1e-6)
    limited = data_of(core, method_of(name, advantage_clip=0.5)).advantages
    torch.testing.assert_close(limited, data.advantages.clamp(-0.5, 0.5))
    assert limited.abs().max() == 0.5 < data.advantages.abs().max()


@pytest.mark.parametrize("name", sorted({*EVERY} - {"ddpo", "dpok"}))
def test_a_group_of_one_is_refused(name):
    assert "samples_per_prompt" in method_of(name).unfit(6, 1)
    assert method_of(name).unfit(6, 2) is None


def test_a_part_of_the_deviation_leaves_the_rest_as_published():
    deviation = resolve("dance_grpo", assignments=["method.deviation.over=round"]).method.deviation
    assert deviation.model_dump() == {"over": "round", "correction": 1, "epsilon": 1e-8}


def test_a_round_of_one_has_no_deviation():
    deviation = method_of("flow_grpo").config.deviation
    assert group_normalised(["a"], torch.tensor([3.0]), deviation).tolist() == [0.0]


# Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_cost_counts_the_prior_for_a_divergence_alone(name):
    core = core_of(name)
    batch = core.batch((prompt, i) for prompt in "ab" for i in range(4))
    assert method_of("ddpo", fraction=0.5).steps(core, batch).shape == (8, 4)
    transitions = 8 * {"ddpo": 6, "grpo": 4, "dpok": 6, "mix_grpo": 4}.get(name, 5)
    assert method_of(name, kl=0.0).nfe(core, batch) == NFE(48, transitions, transitions)
    assert method_of(name, kl=0.5).nfe(core, batch) == NFE(48, 2 * transitions, transitions)


def test_the_last_step_is_never_trained_unless_asked_for():
    core = core_of("flow_grpo")
    places = core.kernel.timesteps.round().long()
    for asked in (False, True):
        method = method_of("flow_grpo", train_last=asked)
        rows = gradient(core, method, data_of(core, method))[places].any(1)
        assert rows.tolist() == [True] * 5 + [asked]


def test_a_window_of_noise_moves_and_trains_alone():
    core = core_of("mix_grpo")
    places, starts = core.kernel.timesteps.round().long(), []
    for number in (0, 2, 3, 9, 12):
        method = method_of("mix_grpo", window=2, window_rounds=3)
        data = data_of(core, method, number)
        first = (number // 3) % 4
        starts.append(first)
        outputs, z = data.model_output, data.latents
        for k in range(6):
            mean = core.kernel.mean(z[:, k], outputs[:, k], k)
            level, after = core.kernel.sigmas[k], core.kernel.sigmas[k + 1]
            straight = z[:, k] + (after - level) * outputs[:, k]
            noisy = first <= k < first + 2
            assert torch.allclose(z[:, k + 1], straight, atol=1e-12) != noisy
            if noisy:  # the draw is one of the full sampler's
                scores = (z[:, k + 1] - mean) / core.kernel.std(k, mean)
                assert 0.2 < scores.std() < 2
        assert data[2:5].noisy.tolist() == [[first, first + 1]] * 3
        rows = gradient(core, method, data[:4])[places].any(1).nonzero().flatten()
        assert rows.tolist() == [first, first + 1]
    assert starts == [0, 0, 1, 3, 0]


def test_a_window_reaches_the_last_step_if_asked_for():
    core = core_of("mix_grpo")
    assert method_of("mix_grpo", window=9).window(core, 0) == (0, 5)
    assert method_of("mix_grpo", window=9, train_last=True).window(core, 0) == (0, 6)


def test_one_start_for_the_samples_of_a_prompt():
    core = core_of("dance_grpo")
    starts = [data_of(core, method_of("dance_grpo"), number).latents[:, 0] for number in (0, 1)]
    for z in starts:
        assert torch.equal(z[:4], z[:1].expand(4, 2))
        assert torch.equal(z[4:], z[4:5].expand(4, 2))
        assert not torch.equal(z[0], z[4])
    assert not torch.equal(*starts)
    others = data_of(core, method_of("flow_grpo")).latents[:, 0]
    assert len(others.unique(dim=0)) == 8
