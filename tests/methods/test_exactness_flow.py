"""The newer methods against mathematics: whole-group gradients, leaps, the value's equation; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.draft import DRaFT, DRaFTConfig
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from bench.methods.rtb import SoftmaxRTB, SoftmaxRTBConfig
from bench.methods.vgg_flow import VGGFlow, VGGFlowConfig
from scaffold import BETA, DIRECTION, Wavy, gaussian_core, gradients, sample, with_rewards

from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.options import Config
from bench.sampling.grids import flow_kernel
from bench.sampling.kernel import gaussian_log_prob


@pytest.mark.parametrize("micro_batch", [5, 12, 24], ids=["two passes", "a pass a group", "a pass"])
@pytest.mark.parametrize("prior", [True, False], ids=["rtb_softmax", "tmpo"])
def test_balance_within_a_group_has_the_gradient_of_its_equation(prior, micro_batch):
    """Whatever the micro-batch, of groups of 4 · 3 rows; the equation is written for every prompt's rows at once."""
    core = gaussian_core(3, Wavy)
    core.model.adapters()["bias"].data[core.kernel.timesteps] = 0.1
    core = replace(core, micro_batch=micro_batch)
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


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_leaps_have_their_own_derivative_and_the_samples_values(kind):
    """Central differences of `∇r(z_K) · x̂_θ(z_j + leap_θ(z_k) − leap)`, all samples held fixed."""
    core, h = gaussian_core(5, Wavy), 1e-6
    if kind == "flow":
        model = GaussianFlowModel(2, (0.7, -0.2), 0.6, dtype=torch.float64)
        core = Core(model, flow_kernel(5, dtype=torch.float64), Wavy(Config()), 1.0)
    places = core.kernel.timesteps.round().long()
    for table, value in zip(core.model.adapters().values(), (0.2, -0.1), strict=True):
        table.data[places] = value
    batch = core.batch((f"prompt {i}", 0) for i in range(6))
    pairs = core.choose_pair(batch)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(pairs.unique(dim=0)) > 2
    path, rows = core.rollout(batch).latents, torch.arange(6)
    k, j = pairs.unbind(1)
    _, slope = core.reward_gradient(path[:, -1], batch.prompts)
    kernel, text = core.kernel, batch.conditioning

    def leap() -> torch.Tensor:
        z = path[rows, k]
        output = core.predict(z, k, text)
        return kernel.noised(kernel.clean(z, output, k), kernel.noise(z, output, k), j)

    with torch.no_grad():
        start = leap()

    def value() -> float:
        with torch.no_grad():
            z = path[rows, j] + leap() - start
            return -float((slope * kernel.clean(z, core.predict(z, j, text), j)).sum()) / 6

    method, tables = DRaFT(DRaFTConfig(leap=True)), list(core.model.adapters().values())
    total, _ = gradients(method.losses(core, batch), 6, tables)
    assert total == pytest.approx(-float(core.reward(path[:, -1], batch.prompts).mean()), rel=1e-12)
    for table in tables:
        for t in places.tolist():
            before = table.data[t, 0].item()
            table.data[t, 0] = before + h
            above = value()
            table.data[t, 0] = before - h
            difference = (above - value()) / (2 * h)
            table.data[t, 0] = before
            assert table.grad[t, 0].item() == pytest.approx(difference, rel=1e-5, abs=1e-8), t


def test_the_values_equation_vanishes_at_its_solution_and_nowhere_near():
    """A linear reward on a Gaussian: `β G_k = −β Π J w` is constant in z, the velocity the prior's and that."""
    model = GaussianFlowModel(2, (0.7, -0.2), 0.6, dtype=torch.float64)
    core = gaussian_core(2)
    core = Core(model, flow_kernel(6, eta=0.0, dtype=torch.float64), core.reward_model, BETA)
    method = VGGFlow(VGGFlowConfig(fraction=1, schedule="constant", largest=None))
    core.networks.update(method.networks(model))
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
