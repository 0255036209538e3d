"""Adjoint Matching against mathematics: the linear-Gaussian optimum, and the adjoint by autograd; float64."""

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching, AdjointMatchingConfig, lean_adjoint
from linear_gaussian import PATHS, everything, places, shift_policy, truth_of
from scaffold import gradients, sample

from bench.diagnose.selftest.scaffold import BETA, Wavy, gaussian_core


@PATHS
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_adjoint_matching_vanishes_at_the_optimum_and_nowhere_near(path, eta):
    core = gaussian_core(8, path=path, eta=eta)
    method = AdjointMatching(AdjointMatchingConfig(fraction=1))
    shift_policy(core, truth_of(core).flow[1:])
    for data in (sample(core, 16), sample(core, 16, prior=True)):
        total, gradient = gradients(method.losses(core, data), len(data), everything(core))
        assert 0 <= total < 1e-10
        assert gradient.abs().max() < 1e-10
    for table in core.model.adapters().values():
        for place in places(core).tolist():
            table.data[place] += 0.1
            assert sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data) > 1e-6
            table.data[place] -= 0.1


@PATHS
def test_adjoint_is_the_gradient_through_the_priors_chain(path):
    core = gaussian_core(5, Wavy, path=path)
    data = sample(core, 6, prior=True)
    adjoint, means, rewards = lean_adjoint(core, data)
    assert torch.equal(rewards, core.reward(data.latents[:, -1], data.prompts))
    for k in range(core.kernel.steps + 1):
        z = start = data.latents[:, k].clone().requires_grad_()
        for j in range(k, core.kernel.steps):  # the same noise, whatever the state
            mean = core.kernel.mean(z, core.predict(z, j, data.conditioning, prior=True), j)
            z = mean + data.latents[:, j + 1] - means[:, j]
        (gradient,) = torch.autograd.grad(core.reward(z, data.prompts).sum(), start)
        assert torch.allclose(adjoint[:, k], -BETA * gradient, rtol=1e-10)
