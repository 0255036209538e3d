"""VGG-Flow against mathematics: the solution of the value's equation, and every term in closed form; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.vgg_flow import VGGFlow, VGGFlowConfig, VGGFlowPruned, VGGFlowPrunedConfig
from linear_gaussian import places
from scaffold import gradients, sample

from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, DIRECTION, Wavy, gaussian_core


def linear_core(path: str = "flow") -> Core:
    """A linear reward on a Gaussian, sampled without noise: its gradient is `w` everywhere."""
    return gaussian_core(6, path=path, eta=0.0)


def prior_jacobians(core: Core) -> torch.Tensor:
    """`∂μ_#/∂z_k` [K, 2], diagonal and the same at every z."""
    ends = (torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    text, steps = core.model.encode([""]), range(core.kernel.steps)
    with torch.no_grad():
        means = [[core.kernel.mean(z, core.predict(z, k, text, prior=True), k)[0] for z in ends] for k in steps]
    return torch.stack([high - low for low, high in means])


def test_the_values_equation_vanishes_at_its_solution_and_nowhere_near():
    """A linear reward on a Gaussian: `β G_k = −β Π J w` is constant in z, the velocity the prior's and that."""
    core = linear_core()
    model = core.model
    method = VGGFlow(VGGFlowConfig(fraction=1, schedule="constant", largest=None))
    core.networks.update(method.networks(model))
    times, table = places(core).tolist(), core.networks["value"].bias
    guide = [-BETA * DIRECTION]
    for jacobian in prior_jacobians(core).flip(0):
        guide.insert(0, jacobian * guide[0])
    for k, place in enumerate(times):
        table.data[place] = guide[k] + BETA * DIRECTION
        model.adapters()["bias"].data[place] = guide[k]
    data = sample(core, 8)
    weights = [*model.adapters().values(), *core.networks["value"].parameters()]
    total, gradient = gradients(method.losses(core, data), len(data), weights)
    assert 0 <= total < 1e-10
    assert gradient.abs().max() < 1e-8
    for moved in (table, model.adapters()["bias"], core.networks["value"].slope):
        for place in times:
            moved.data[place] += 0.1
            assert sum(loss.values.sum().item() for loss in method.losses(core, data)) > 1e-6
            moved.data[place] -= 0.1


def test_the_first_update_of_a_warm_up_is_finite():
    """There β and ν_φ are 0."""
    core = replace(linear_core(), beta=0.0)
    method = VGGFlow(VGGFlowConfig(fraction=1))
    core.networks.update(method.networks(core.model))
    weights = [*core.model.adapters().values(), *core.networks["value"].parameters()]
    data = sample(core, 8)
    total, gradient = gradients(method.losses(core, data), len(data), weights)
    assert total == 0 and torch.isfinite(gradient).all()


@pytest.mark.parametrize("path", ["flow", "diffusion"])
def test_every_term_is_its_equation_and_trains_its_own_network(path):
    """Constant ν_φ and a constant change of the policy's output at each step, any numbers."""
    core = linear_core(path)
    method = VGGFlow(VGGFlowConfig(fraction=1, schedule="quad", largest=None, consistency=0.5, terminal=3.0))
    core.networks.update(method.networks(core.model))
    times, rng = places(core), torch.Generator().manual_seed(0)
    policy, value = core.model.adapters()["bias"], core.networks["value"].bias
    policy.data[times] = torch.randn(6, 2, generator=rng, dtype=torch.float64)
    value.data[[*times.tolist(), 0]] = torch.randn(7, 2, generator=rng, dtype=torch.float64)
    data = sample(core, 4)

    nu = value[[*times.tolist(), 0]]  # the finished sample has time 0
    s = core.kernel.noise_level(torch.arange(7), nu)
    beta_g = torch.cat([nu[:-1], torch.zeros(1, 2)]) - BETA * (1 - s) ** 2 * DIRECTION
    beta_g, beta_g_next = beta_g[:-1], beta_g[1:].detach()
    change = (beta_g - prior_jacobians(core) * beta_g_next) / BETA / (s[:-1] - s[1:])
    # a change of v moves x̂ by −s times it, a change of ε by −s/α times it
    unit = core.kernel.alphas_cumprod[:-1, None].sqrt() if path == "diffusion" else 1
    terms = {
        "velocity": (policy[times] - unit * beta_g.detach()).square().mean(1),
        "consistency": 0.5 * change.square().mean(1),
        "terminal": 3.0 * nu[1:].square().mean(1) * (torch.arange(6) == 5),
    }
    (loss,) = method.losses(core, data)
    for name, expected in terms.items():
        assert torch.allclose(loss.metrics[name].view(6, 4), expected[:, None].detach().expand(6, 4), rtol=1e-9), name
    total = sum(terms.values())
    assert torch.allclose(loss.values.view(6, 4), total[:, None].expand(6, 4) / 6, rtol=1e-9)
    theirs = torch.autograd.grad(total.mean(), [policy, value])
    gradients([loss], len(data), [policy, value])
    assert torch.allclose(policy.grad, theirs[0], rtol=1e-9)
    assert torch.allclose(value.grad, theirs[1], rtol=1e-9)


def test_the_pruned_form_follows_the_gradient_at_the_finished_sample():
    core = gaussian_core(4, Wavy, path="flow")
    policy, times = core.model.adapters()["bias"], places(core)
    policy.data[times] = 0.3
    data, method = sample(core, 5), VGGFlowPruned(VGGFlowPrunedConfig(fraction=1, largest=0.5))
    rewards, score = core.reward_gradient(data.latents[:, -1], data.prompts)
    norm = score.norm(dim=1, keepdim=True)
    assert (norm > 0.5).any()
    score = score * (0.5 / norm).clamp(max=1)
    levels = core.kernel.noise_level(torch.arange(4), score)
    expected = [(policy[t] + BETA * (1 - s) * score).square().mean(1) for t, s in zip(times, levels, strict=True)]
    (loss,) = method.losses(core, data)
    assert torch.allclose(loss.values, torch.cat(expected) / 4, rtol=1e-9)
    assert torch.equal(loss.metrics["reward"], rewards)
