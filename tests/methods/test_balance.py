"""The balance losses against mathematics: the linear-Gaussian optimum, and their equations by autograd; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.balance.dag_kl import DAGKL, DAGKLConfig
from bench.methods.balance.db import DB, DBConfig, ResDB, ResDBConfig
from bench.methods.balance.rtb import RTB, RTBConfig
from bench.methods.balance.softmax import TMPO, SoftmaxRTB
from linear_gaussian import PATHS, losses_and_departures, places, shift_policy, truth_of
from scaffold import gradients, sample, with_rewards

from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, DIRECTION, Wavy, gaussian_core
from bench.models.analytic import GaussianModel
from bench.options import Config
from bench.sampling.kernel import gaussian_log_prob


def set_balanced_flow(core: Core, method: DB) -> None:
    """The exact log-flow `b_k·z + c_k` beside the forward-looking term, at the optimal policy."""
    truth, times = truth_of(core), places(core)
    shift_policy(core, truth.flow[1:])
    core.networks.update(method.networks(core.model))
    zero = torch.zeros(1, 2, dtype=torch.float64)
    with torch.no_grad():
        at_zero = [core.kernel.mean(zero, core.predict(zero, k, zero, prior=True), k)[0] for k in range(len(times))]
        clean = [core.kernel.clean(zero, core.predict(zero, k, zero), k)[0] for k in range(len(times))]
        unit = [core.kernel.clean(zero + 1, core.predict(zero + 1, k, zero), k)[0] for k in range(len(times))]
    constant, constants = torch.zeros((), dtype=torch.float64), []
    for k in reversed(range(len(times))):  # log E exp(b·z_{k+1} + c) of a Gaussian step
        b = truth.flow[k + 1]
        constant = constant + b @ at_zero[k] + truth.variance[k] * b @ b / 2
        constants.insert(0, constant)
    flow = core.networks["flow"]
    for k, t in enumerate(times.tolist()):
        slope = truth.flow[k] - BETA * DIRECTION * (unit[k] - clean[k])
        flow.slope.data[t] = slope
        flow.bias.data[t] = (constants[k] - BETA * DIRECTION @ clean[k]) / 2  # the flow is a sum over two elements
    flow.bias.data[0] = 7.0  # of the finished sample, where the learned flow does not count


@PATHS
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_residual_db_vanishes_at_the_optimum_and_nowhere_near(path, eta):
    core = gaussian_core(8, path=path, eta=eta)
    method = ResDB(ResDBConfig())
    set_balanced_flow(core, method)
    times, flow = places(core).tolist(), core.networks["flow"]
    tables = [(table, times) for table in (*core.model.adapters().values(), flow.bias, flow.slope)]
    for data in (sample(core, 16), sample(core, 16, prior=True)):
        losses_and_departures(core, method, data, tables)


def test_balance_of_some_transitions_knows_where_each_ends():
    core = gaussian_core(8)
    method = ResDB(ResDBConfig(fraction=0.3))
    set_balanced_flow(core, method)
    losses = torch.cat([loss.values for loss in method.losses(core, sample(core, 16, prior=True))])
    assert len(losses) == 3 * 16
    assert losses.max() < 1e-18


class Guided(GaussianModel):
    """Guidance adds 1 to the prediction."""

    @classmethod
    def rows(cls, guidance: float) -> int:
        return 2

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        return super().predict(z, t, conditioning, prior=prior) + float(guided)


def test_states_are_scored_by_predictions_without_guidance():
    """And all that the balance asks for, once: where a chosen transition begins, and where one ends."""
    core = gaussian_core(8, Wavy)
    core = replace(core, model=Guided(2, (0.7, -0.2), 0.6, dtype=torch.float64), micro_batch=10)
    method = DB(DBConfig(fraction=0.3))
    core.networks.update(method.networks(core.model))
    data, before = sample(core, 16), core.meter.reward_calls
    steps = method.steps(core, data)
    *_, terms = method.terms(core, data, steps, core.micro_batch)
    calls = core.meter.reward_calls - before
    asked = torch.zeros(16, 9, dtype=torch.bool).scatter_(1, steps, True).scatter_(1, steps + 1, True)
    assert torch.equal(terms.rewards.isnan(), ~asked)
    assert calls == asked.sum()
    for row, k in asked.nonzero().tolist():
        z, text = data.latents[row : row + 1, k], data.conditioning[row : row + 1]
        clean = z if k == 8 else core.kernel.clean(z, core.predict(z, k, text, guided=False), k)
        assert terms.rewards[row, k] == pytest.approx(core.reward(clean, ["any"]).item(), rel=1e-9)


def test_averaged_densities_have_another_target():
    """The same policy and flow under densities averaged over elements: the published reduction counts β d times."""
    core = gaussian_core(8)
    method = ResDB(ResDBConfig(reduction="mean"))
    set_balanced_flow(core, method)
    data = sample(core, 16)
    assert sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data) > 1e-2


@pytest.mark.parametrize("micro_batch", [70, 20], ids=["a pass", "two passes"])
def test_dag_kl_gradients_go_where_they_belong(micro_batch):
    """The flow learns from the balance alone, the policy from the advantage alone, and A = −balance, left one out."""
    core = gaussian_core(6)
    core = replace(core, micro_batch=micro_batch)  # of 32 trajectories
    core.model.adapters()["bias"].data[places(core)] = 0.1
    data = sample(core, 32)
    method, balance_only = (
        DAGKL(DAGKLConfig(reduction="sum", trust=0, clip=0.2, policy_weight=w)) for w in (1.0, 1e-12)
    )
    core.networks.update(method.networks(core.model))
    policy = list(core.model.adapters().values())
    total, gradient = gradients(method.losses(core, data), len(data), policy)
    (terms,) = method.terms(core, data, torch.arange(6).flip(0).expand(32, 6), 1000)
    balance = terms.flow + terms.log_policy - terms.log_reference - terms.flow_next
    log_prob, table = terms.log_policy, balance.detach().view(6, 32)
    advantages = []
    for column in -table:
        others = [torch.cat([column[:i], column[i + 1 :]]) for i in range(32)]
        means = torch.stack([rest.mean() for rest in others])
        centred = column - means
        spread = torch.stack([torch.cat([centred[:i], centred[i + 1 :]]).square().mean() for i in range(32)]).sqrt()
        advantages.append((centred / spread).clamp(-5, 5))
    surrogate = -(torch.cat(advantages) * log_prob).sum() / 6 / 32  # at ratio 1 its gradient is the clipped one's
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, policy)])
    assert torch.allclose(gradient, expected, atol=1e-7)  # the deviation's 1e-8
    assert total == pytest.approx(float((table**2).mean() - torch.cat(advantages).mean()), rel=1e-6)
    _, silent = gradients(balance_only.losses(core, data), len(data), policy)
    assert silent.abs().max() < 1e-9


@PATHS
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_rtb_keeps_the_noise_alone(path, eta):
    """At the optimum the residual is `log Z_φ − b_0·z_0 −` a constant: `z_0` is not tilted."""
    core = gaussian_core(8, path=path, eta=eta)
    truth, method = truth_of(core), RTB(RTBConfig())
    shift_policy(core, truth.flow[1:])
    core.networks.update(method.networks(core.model))
    for data in (sample(core, 32), sample(core, 32, prior=True)):
        data = with_rewards(core, data)
        losses = torch.cat([loss.values for loss in method.losses(core, data)])
        leak = data.latents[:, 0] @ truth.flow[0]
        signed = losses.detach().sqrt() * torch.sign(-losses.detach())  # log Z_φ = 0, far below the true log Z
        constant = signed + leak
        assert (constant - constant.mean()).abs().max() < 1e-10
        core.networks["log_z"].bias.data[0] = -constant.mean() / 2  # a sum over two elements
        losses = torch.cat([loss.values for loss in method.losses(core, data)])
        assert torch.allclose(losses, leak**2, atol=1e-10)
        for table in core.model.adapters().values():
            for place in places(core).tolist():
                table.data[place] += 0.1
                moved = torch.cat([loss.values for loss in method.losses(core, data)])
                assert not torch.allclose(moved, leak**2, atol=1e-5)
                table.data[place] -= 0.1
        core.networks["log_z"].bias.data.zero_()
    assert leak.var() == pytest.approx(float(truth.flow[0] @ truth.flow[0]), rel=0.8)


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
    method = (SoftmaxRTB if prior else TMPO)(Config())
    ours, gradient = gradients(method.losses(core, data), len(data), weights)
    assert ours == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(gradient, theirs, rtol=1e-8, atol=1e-12)
    assert theirs.any()
