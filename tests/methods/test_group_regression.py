"""DGPO and CRD: identities of their gradients, and the comparison within a prompt's samples."""

from dataclasses import replace

import pytest
import torch
from bench.methods.regression.crd import CRD, CRDConfig
from bench.methods.regression.dgpo import DGPO, DGPOConfig
from scaffold import gradients
from torch import Tensor, nn
from torch.nn.functional import softplus

from bench.core import Core
from bench.diagnose.selftest.scaffold import gaussian_core
from bench.method import Method
from bench.sampling.kernel import mean_square
from bench.sampling.trajectory import Trajectory

PROMPTS, EACH = "ab", 3


def round_of(core: Core) -> Trajectory:
    """Two prompts of three samples, whose advantages are given."""
    data = core.rollout(core.batch((prompt, i) for prompt in PROMPTS for i in range(EACH)))
    advantages = torch.tensor([1.0, -0.4, -0.6, 0.8, 0.5, -1.3], dtype=torch.float64)
    return replace(data, rewards=advantages, advantages=advantages)


def core_of(method: Method, *, moved: bool = True) -> Core:
    """The Gaussian as a flow, with policy and copies apart from the prior and, unless `moved` is False, one another."""
    core = gaussian_core(4, path="flow", method=method)
    bias = core.model.adapters()["bias"]
    bias.data += 0.3
    for number, name in enumerate(core.copies):
        core.copies[name] = {key: p.detach().clone() for key, p in core.model.adapters().items()}
        if moved:
            core.copies[name]["bias"] += 0.2 * (number + 1)
    return core


def weights(core: Core) -> list[nn.Parameter]:
    return list(core.model.adapters().values())


def at_levels(core: Core, method: Method, data: Trajectory) -> list[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """o_θ, the references' outputs and the targets u of the whole round, level by level, with noise found by name."""
    steps, levels = method.steps(core, data), []
    for column in range(steps.shape[1]):
        names = data.samples
        if isinstance(method, DGPO):  # the group's noise is that of its first sample
            names = [(prompt, 0) for prompt in data.prompts]
        k, x = steps[:, column], data.latents[:, -1]
        noise = core.noise(replace(data, samples=names), column, like=x)
        z, u = core.kernel.noised(x, noise, k), core.kernel.target(x, noise, k)
        outputs = {name: core.predict(z, k, data.conditioning, weights=name) for name in core.copies}
        outputs["prior"] = core.predict(z, k, data.conditioning, prior=True)
        levels.append((core.predict(z, k, data.conditioning), outputs, u))
    return levels


def test_dgpo_has_the_gradient_of_its_preference():
    """`mean over groups of log(1 + exp s_G) / β_d`, by autograd through s_G itself, and the distance to the prior."""
    strength = 7.0
    method = DGPO(DGPOConfig(strength=strength, clip=1e6, kl=0.3, fraction=0.5))
    core = core_of(method)
    data = round_of(core)
    total = torch.zeros((), dtype=torch.float64)
    levels = at_levels(core, method, data)
    for policy, outputs, u in levels:
        excess = mean_square(policy - u) - mean_square(outputs["prior"] - u)
        preference = strength * (data.advantages * excess).view(len(PROMPTS), EACH).mean(1)
        total = total + softplus(preference).mean() / strength
        total = total + 0.3 * mean_square(policy - outputs["prior"]).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total / len(levels), weights(core))])
    _, found = gradients(method.losses(core, data), len(data), weights(core))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_dgpo_weighs_by_one_half_at_the_prior_and_equal_samples_teach_nothing():
    """Equal samples with advantages that sum to zero: one noise for all makes their gradients cancel exactly."""
    method = DGPO(DGPOConfig(clip=1e6, kl=0.0, fraction=1))
    core = core_of(method)
    data = round_of(core)
    equal = replace(data, latents=data.latents[:1].expand_as(data.latents).contiguous())
    _, found = gradients(method.losses(core, equal), len(equal), weights(core))
    assert found.abs().max() < 1e-14
    _, found = gradients(method.losses(core, data), len(data), weights(core))
    assert found.abs().max() > 1e-3
    core.model.adapters()["bias"].data.zero_()
    for loss in method.losses(core, data):
        torch.testing.assert_close(loss.metrics["weight"], torch.full_like(loss.metrics["weight"], 0.5))


@pytest.mark.parametrize("limit", [0.02, 1e6])
def test_dgpo_stops_errors_that_have_moved_as_asked(limit):
    """Beyond the range an error keeps its place in the sum s_G and gets no gradient."""
    method = DGPO(DGPOConfig(clip=limit, kl=0.0, fraction=1))
    core = core_of(method)
    core.copies["old"]["bias"] -= 0.9
    data = round_of(core)
    (loss,) = method.losses(core, data)
    ratio, advantage = loss.metrics["ratio"], data.advantages.repeat(core.kernel.steps)
    expected = torch.where(advantage > 0, ratio > 1 + limit, ratio < 1 - limit)
    assert torch.equal(loss.metrics["clipped"], expected.float())
    assert 0 < loss.metrics["clipped"].mean() < 1 or limit > 1
    policy = [p for p, _, _ in at_levels(core, method, data)]
    u = [target for _, _, target in at_levels(core, method, data)]
    errors = torch.cat([mean_square(p - target) for p, target in zip(policy, u, strict=True)])
    weighted = loss.metrics["weight"] * advantage * errors.where(~expected, errors.detach())
    theirs = torch.autograd.grad(weighted.sum() / core.kernel.steps, weights(core))
    _, found = gradients([loss], 1, weights(core))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in theirs]))


def test_crd_at_the_old_policy():
    """There the loss is `c/β Var(R)`, and its gradient `−2c mean (R − R̄) ∇ρ`, which does not depend on β."""
    found = []
    for scale in (1.0, 4.0):
        method = CRD(CRDConfig(scale=scale, kl=1e-12, kl_floor=0.0, fraction=0.5))
        core = core_of(method, moved=False)
        data = round_of(core)
        centred = (data.advantages.view(2, EACH) - data.advantages.view(2, EACH).mean(1, keepdim=True)).flatten()
        loss, gradient = gradients(method.losses(core, data), len(data), weights(core))
        assert loss == pytest.approx(5 / scale * float((centred**2).mean()), rel=1e-9)
        found.append(gradient)
        total, levels = torch.zeros((), dtype=torch.float64), at_levels(core, method, data)
        for policy, _, u in levels:
            w = (policy - u).abs().mean(1).detach()
            total = total + 2 * 5 * (centred * mean_square(policy - u) / w).mean() / len(levels)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, weights(core))])
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("method", [DGPO(DGPOConfig(fraction=0.5)), CRD(CRDConfig(fraction=0.5))], ids=["dgpo", "crd"])
def test_prompts_are_compared_apart(method):
    """An update of two prompts is the mean of an update on each, also if their samples lie between one another."""
    core = core_of(method)
    data = round_of(core)
    apart = [gradients(method.losses(core, data[rows]), EACH, weights(core)) for rows in (slice(0, 3), slice(3, 6))]
    for order in ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]):
        loss, gradient = gradients(method.losses(core, data[torch.tensor(order)]), len(data), weights(core))
        assert loss == pytest.approx(sum(value for value, _ in apart) / 2, rel=1e-10)
        torch.testing.assert_close(gradient, sum(g for _, g in apart) / 2)


@pytest.mark.parametrize("method", [DGPO(DGPOConfig(fraction=0.5)), CRD(CRDConfig(fraction=0.5))], ids=["dgpo", "crd"])
def test_two_passes_ask_the_references_once(method, monkeypatch):
    core = replace(core_of(method), micro_batch=2)  # less than a group
    data, asked = round_of(core), []
    predict = core.predict

    def counted(z, *args, **options):
        asked.append((options.get("weights", "prior" if options.get("prior") else "policy"), len(z)))
        return predict(z, *args, **options)

    monkeypatch.setattr(Core, "predict", lambda self, *args, **options: counted(*args, **options))
    rows = sum(len(loss.values) for loss in method.losses(core, data))
    count = {name: sum(n for who, n in asked if who == name) for name in ("policy", "old", "prior")}
    assert count == {"policy": 2 * rows, "old": rows, "prior": rows}


def test_crd_sees_rewards_up_to_a_constant():
    method = CRD(CRDConfig(kl=0.3, kl_floor=0.3, fraction=0.5))
    core = core_of(method)
    data = round_of(core)
    loss, gradient = gradients(method.losses(core, data), len(data), weights(core))
    more, other = gradients(method.losses(core, replace(data, advantages=data.advantages + 0.7)), 6, weights(core))
    assert more == pytest.approx(loss)
    torch.testing.assert_close(gradient, other)


def test_who_samples_and_what_rewards_become():
    dgpo, crd = DGPO(DGPOConfig(old_from=5, advantage_clip=1.0)), CRD(CRDConfig(advantage_clip=1.0))
    core = core_of(dgpo)
    batch = core.batch([("a", 0)])
    for number, weights_of in ((4, None), (5, "old")):
        assert torch.equal(dgpo.collect(core, batch, number).latents, core.rollout(batch, weights=weights_of).latents)
    data = round_of(core)
    normalised = data.rewards.view(2, EACH)
    normalised = (normalised - normalised.mean(1, keepdim=True)).flatten() / (data.rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(dgpo.prepare(core, data).advantages, normalised.clamp(-1, 1))
    torch.testing.assert_close(crd.prepare(core, data).advantages, normalised.clamp(-1, 1) / 2 + 0.5)
    core = core_of(crd)
    assert torch.equal(crd.collect(core, batch, 0).latents, core.rollout(batch, weights="sampler").latents)
    assert dgpo.unfit(4, 1) and not dgpo.unfit(4, 2)
    old = dgpo.copies()["old"]
    assert (old.rounds, old.decay(100), old.decay(1000)) == (None, 0.1, 0.3)
