"""The newer methods against mathematics: whole-group gradients, the value's equation; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from bench.methods.rtb import SoftmaxRTB, SoftmaxRTBConfig
from bench.methods.vgg_flow import VGGFlow, VGGFlowConfig
from scaffold import BETA, DIRECTION, Wavy, gaussian_core, gradients, sample, with_rewards

from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.sampling.kernel import flow_kernel, gaussian_log_prob


@pytest.mark.parametrize("micro_batch", [5, 12, 24], ids=["two passes", "a pass a group", "a pass"])
@pytest.mark.parametrize("prior", [True, False], ids=["rtb_softmax", "tmpo"])
def test_balance_within_a_group_has_the_gradient_of_its_equation(prior, micro_batch):
    """Whatever the micro-batch, of groups of 4 · 3 rows; the equation is written for every prompt's rows at once."""
    core = gaussian_core(3, Wavy)
    core.model.adapters()["bias"].data[core.kernel.timesteps] = 0.1
    core.micro_batch = micro_batch
    batch = core.batch((prompt, i) for i in range(4) for prompt in "ab")
    with torch.no_grad():
        data = with_rewards(core, core.rollout(batch))
    weights = list(core.model.adapters().values())
    ratio = 0
    for k in range(3):
        z, std = data.latents[:, k], core.kernel.std(k, data.latents[:, k])
        for network, sign in ((False, 1), (True, -1))[: 1 + prior]:
            mean = core.kernel.mean(z, core.predict(z, k, data.conditioning, prior=network), k)
            ratio = ratio + sign * gaussian_log_prob(data.latents[:, k + 1], mean, std)
    expected = sum(
        (torch.log_softmax(ratio[rows], 0) - torch.log_softmax(BETA * data.rewards[rows], 0)).square().sum()
        for rows in (torch.arange(0, 8, 2), torch.arange(1, 8, 2))
    ) / len(data)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected, weights)])
    method = SoftmaxRTB(SoftmaxRTBConfig(prior=prior))
    ours, gradient = gradients(method.losses(core, data), len(data), weights)
    assert ours == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(gradient, theirs, rtol=1e-8, atol=1e-12)
    assert theirs.any()


def test_the_values_equation_vanishes_at_its_solution_and_nowhere_near():
    """A linear reward on a Gaussian: `β G_k = −β Π J w` is constant in z, the velocity the prior's and that."""
    model = GaussianFlowModel(2, (0.7, -0.2), 0.6, dtype=torch.float64)
    core = gaussian_core(2)
    core = Core(model, flow_kernel(6, eta=0.0, dtype=torch.float64), core.reward_model, BETA)
    method = VGGFlow(VGGFlowConfig(fraction=1, schedule="constant", largest=None))
    core.networks = method.networks(model)
    places, text = core.kernel.timesteps.round().long(), model.encode([""])
    guide, table = [-BETA * DIRECTION], core.networks["value"].bias
    with torch.no_grad():
        for k in reversed(range(6)):
            ends = (torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
            low, high = (core.kernel.mean(z, core.predict(z, k, text, prior=True), k) for z in ends)
            guide.insert(0, (high - low)[0] * guide[0])
    for k, place in enumerate(places.tolist()):
        table.data[place] = guide[k] + BETA * DIRECTION
        model.adapters()["bias"].data[place] = guide[k]
    data = sample(core, 8)
    weights = [*model.adapters().values(), *core.networks["value"].parameters()]
    total, gradient = gradients(method.losses(core, data), len(data), weights)
    assert 0 <= total < 1e-10
    assert gradient.abs().max() < 1e-8
    for moved in (table, model.adapters()["bias"], core.networks["value"].slope):
        for place in places.tolist():
            moved.data[place] += 0.1
            assert sum(loss.values.sum().item() for loss in method.losses(core, data)) > 1e-6
            moved.data[place] -= 0.1


def test_preferences_of_equal_rewards_teach_nothing():
    core = gaussian_core(4, Wavy)
    core.model.adapters()["bias"].data[core.kernel.timesteps] = 0.1
    batch = core.batch((prompt, i) for prompt in "ab" for i in range(4))
    with torch.no_grad():
        data = with_rewards(core, core.rollout(batch))
    method, found = OnlineDPO(OnlineDPOConfig(fraction=1, strength=10)), []
    for rewards in (data.rewards, torch.cat([torch.ones(4), data.rewards[4:]]), torch.ones(8)):
        pairs = method.prepare(core, replace(data, rewards=rewards.double()))
        _, gradient = gradients(method.losses(core, pairs), 8, core.model.adapters().values())
        tied = torch.cat([loss.metrics["tied"] for loss in method.losses(core, pairs)]).mean()
        found.append((float(gradient.norm()), float(tied)))
        winners = torch.stack([data.latents[:4, -1][rewards[:4].argmax()], data.latents[4:, -1][rewards[4:].argmax()]])
        assert torch.equal(pairs.latents[:, 1], winners.repeat_interleave(4, 0))
    assert [tied for _, tied in found] == [0.0, 0.5, 1.0]
    assert found[0][0] > 0
    assert found[1][0] > 0
    assert found[2][0] == 0
