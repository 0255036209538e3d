"""The methods against mathematics: closed-form optima, score-function identities, finite differences; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching, AdjointMatchingConfig
from bench.methods.backprop.draft import DRaFT1, DRaFTFull
from bench.methods.balance.db import ResDB, ResDBConfig
from bench.methods.balance.rtb import RTB, RTBConfig
from bench.methods.nabla.adjoint import NablaGFNAdjoint
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN, NablaGFNNoFlow
from bench.methods.policy_gradient.ddpo import DDPO, DDPOConfig
from bench.methods.policy_gradient.dpok import DPOK, DPOKConfig
from bench.methods.policy_gradient.grpo import GRPO, GRPOConfig
from linear_gaussian import PATHS, everything, losses_and_departures, moments, places, shift_policy, truth_of
from scaffold import BETA, DIRECTION, Wavy, gaussian_core, gradients, perturb, pipeline_model, sample, with_rewards
from torch import Tensor

from bench.core import Core
from bench.method import Method
from bench.options import Config
from bench.runtime.meter import Meter
from bench.sampling.noise import generator
from bench.sampling.trajectory import Batch
from bench.training.advantages import group_baseline, group_normalised


def gammas(core: Core, kind: str) -> Tensor:
    alphas = core.kernel.alphas_cumprod
    gamma = {"alpha": alphas, "sqrt_alpha": alphas.sqrt(), "one": torch.ones_like(alphas)}[kind].clone()
    gamma[-1] = 1
    return gamma


def set_optimum(core: Core, method: NablaMethod) -> None:
    """Plug in the optimal policy and, beside the forward-looking term, the exact rest of the flow's gradient."""
    truth = truth_of(core)
    shift_policy(core, truth.flow[1:])
    core.networks.update(method.networks(core.model))
    look = (gammas(core, method.config.gamma) * truth.look).unsqueeze(1) * BETA * DIRECTION
    core.networks["flow"].bias.data[places(core)] = (truth.flow - look)[:-1]


# ∇-GFlowNet -------------------------------------------------------------------------------------------------------


@PATHS
def test_closed_form_of_the_optimum(path):
    # μ* = μ_# + σ² b_{k+1} tilts the prior's samples by exp(β w·x), up to the noise z_0, which is not tilted.
    core = gaussian_core(10, path=path)
    truth = truth_of(core)
    prior_mean, prior_variance = moments(core, prior=True)
    leak = truth.jacobian.prod() ** 2
    shift_policy(core, truth.flow[1:])
    mean, variance = moments(core)
    assert torch.allclose(mean, prior_mean + BETA * DIRECTION * (prior_variance - leak), rtol=1e-9)
    assert torch.allclose(variance, prior_variance, rtol=1e-9)
    assert leak < 0.01 * prior_variance.max()
    final = sample(core, 2000).latents[:, -1]
    assert ((final.mean(0) - mean).abs() < 4 * (variance / 2000).sqrt()).all()
    assert ((final.var(0) / variance - 1).abs() < 4 * (2 / 2000) ** 0.5).all()


REVERSE = pytest.mark.parametrize("method_class", [NablaGFN, NablaGFNPublished])  # at z_{k+1} and at z_k


@PATHS
@REVERSE
@pytest.mark.parametrize(
    ("gamma", "weighting", "eta"),
    [("alpha", "score", 1.0), ("sqrt_alpha", "kl", 1.0), ("one", "score", 1.0), ("alpha", "kl", 0.6)],
)
def test_nabla_losses_vanish_at_the_optimum(path, gamma, method_class, weighting, eta):
    core = gaussian_core(8, path=path, eta=eta)
    options = {"gamma": gamma, "weighting": weighting, "fraction": 1}
    method = method_class(method_class.Config(**options, trust=1.0))
    set_optimum(core, method)
    for data in (sample(core, 16), replace(sample(core, 16, prior=True), model_output=None)):
        if data.model_output is None:  # off policy, where there is nothing to trust
            method = method_class(method_class.Config(**options, trust=0.0))
        total, gradient = gradients(method.losses(core, data), len(data), everything(core))
        assert 0 <= total < 1e-10
        assert gradient.abs().max() < 1e-10


@PATHS
@REVERSE
def test_nabla_losses_see_every_departure_from_the_optimum(path, method_class):
    core = gaussian_core(8, path=path)
    method = method_class(method_class.Config(weighting="score", fraction=1, trust=0.0))
    set_optimum(core, method)
    data = sample(core, 16)

    def loss() -> float:
        return sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data)

    flow = core.networks["flow"]
    times = places(core).tolist()
    # the default's flow at z_0 enters no loss
    flow_times = times[1:] if method_class is NablaGFN else times
    for name, table, chosen in (
        ("policy bias", core.model.adapters()["bias"], times),
        ("policy slope", core.model.adapters()["slope"], times),
        ("flow bias", flow.bias, [*flow_times, 0]),
        ("flow slope", flow.slope, [*flow_times, 0]),
    ):
        for place in chosen:
            before = table.data[place].clone()
            table.data[place] += 0.1
            assert loss() > 1e-6, (name, place)
            table.data[place] = before
    assert loss() < 1e-10


@pytest.mark.parametrize(("gamma", "share"), [("alpha", 0.62), ("sqrt_alpha", 0.76), ("one", 0.998)])
def test_nabla_without_flow_has_another_fixed_point(gamma, share):
    """The forward loss alone is zero at `μ_# + σ² β γ_{k+1} ∂ẑ/∂z w`, which is not the target's policy."""
    core = gaussian_core(20)
    truth = truth_of(core)
    shift_policy(core, (gammas(core, gamma) * truth.look)[1:, None] * BETA * DIRECTION)
    method = NablaGFNNoFlow(NablaGFNNoFlow.Config(gamma=gamma, fraction=1))
    data = sample(core, 8)
    total, gradient = gradients(method.losses(core, data), len(data), everything(core))
    assert 0 <= total < 1e-10
    assert gradient.abs().max() < 1e-10
    reached = moments(core)[0] - moments(core, prior=True)[0]
    shift_policy(core, truth.flow[1:])
    asked = moments(core)[0] - moments(core, prior=True)[0]
    assert torch.allclose(reached / asked, torch.full((2,), share, dtype=torch.float64), atol=0.005)


# DDPO -------------------------------------------------------------------------------------------------------------


def chunk_gradients(core: Core, method: Method, data: Batch) -> tuple[Tensor, Tensor]:
    """The expected gradient of an update in the steps' biases [K·d], from independent parts, and its standard error."""
    bias, chunks = core.model.adapters()["bias"], []
    for part in data.split(64):
        gradients(method.losses(core, part), len(part), [bias])
        chunks.append(bias.grad[places(core)].flatten())
    stacked = torch.stack(chunks)
    return stacked.mean(0), stacked.std(0) / len(stacked) ** 0.5


def test_ddpo_gradient_of_one_step():
    """With one step and a linear reward, `∇_bias E[r] = ∂μ/∂ε w`; DDPO must expect `−∇ E[r] / (d std(r))`."""
    core, rows = gaussian_core(1, spacing="trailing"), 4096
    method = DDPO(DDPOConfig(fraction=1))
    data = with_rewards(core, sample(core, rows))
    deviation = data.rewards.std(correction=0)
    found, error = chunk_gradients(core, method, method.prepare(core, data))
    expected = -truth_of(core).gain[0] * DIRECTION / deviation / 2
    assert (error < 0.05 * expected.norm()).all()  # Monte Carlo: about 2 %
    assert ((found - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(("depth", "fraction"), [("last", 0.0), ("all", 1.0)])
def test_ddpo_expects_the_gradient_that_draft_computes(depth, fraction):
    """Score function and reparameterisation are two estimators of `∇ E[r]`, of the last step and of all steps."""
    core, rows, steps = gaussian_core(4, Wavy, spacing="trailing", final=0.95), 2048, 4
    core.model.adapters()["bias"].data[places(core)] = 0.2
    ddpo = DDPO(DDPOConfig(fraction=fraction))
    draft = {"last": DRaFT1, "all": DRaFTFull}[depth](Config())
    data = ddpo.prepare(core, with_rewards(core, sample(core, rows)))
    score, score_error = chunk_gradients(core, ddpo, data)
    path, path_error = chunk_gradients(core, draft, core.batch(data.samples))
    # DDPO averages over steps and over both latent elements, and measures rewards in deviations.
    scale = 2 * data.rewards.std(correction=0) * (steps if fraction else 1)
    error = ((score_error * scale) ** 2 + path_error**2).sqrt()
    assert ((score * scale - path).abs() <= 4 * error).all()
    assert error.norm() < 0.1 * path.norm()  # Monte Carlo
    assert (path[:-2] != 0).all() == (depth == "all")


def test_ddpo_ratio_is_one_on_policy_and_clips_on_the_right_side_only():
    core, d, clip = gaussian_core(3), 2, 1e-4
    core.model.adapters()["bias"].data[places(core)] = 0.1
    core = replace(core, micro_batch=8)
    method = DDPO(DDPOConfig(clip=clip, fraction=1))
    data = method.prepare(core, with_rewards(core, sample(core, 8)))
    for loss in method.losses(core, data):
        assert torch.equal(loss.metrics["log_ratio"], torch.zeros(8, dtype=torch.float64))
        assert loss.metrics["clipped"].sum() == 0
        assert torch.equal(loss.values, -data.advantages / core.kernel.steps)
    for ratio, advantage, moves in [
        (1 + 2 * clip, 1.0, False),
        (1 + 2 * clip, -1.0, True),
        (1 - 2 * clip, 1.0, True),
        (1 - 2 * clip, -1.0, False),
        (1 + clip / 2, 1.0, True),
        (1 - clip / 2, -1.0, True),
    ]:
        old = data.log_prob - d * torch.log(torch.tensor(ratio, dtype=torch.float64))
        shifted = replace(data, log_prob=old, advantages=torch.full_like(data.advantages, advantage))
        losses = list(method.losses(core, shifted))
        _, gradient = gradients(losses, len(data), everything(core))
        assert bool(gradient.any()) == moves, (ratio, advantage)
        outside = float(abs(ratio - 1) > clip)
        assert all(loss.metrics["clipped"].mean() == outside for loss in losses)


@pytest.mark.parametrize("name", ["dpok", "grpo"])
def test_policy_gradient_with_divergence_expects_zero_at_the_optimum(name):
    """And only there: the same test sees a policy of seven tenths of the shift."""
    core, rows = gaussian_core(4, spacing="trailing", final=0.95), 8192
    drift = truth_of(core).flow[1:]
    found = []
    for share in (1.0, 0.7):
        shift_policy(core, share * drift)
        batch = core.batch(("one prompt", i) for i in range(rows))
        data = with_rewards(core, core.rollout(batch, record=frozenset({"log_prob"})))
        if name == "dpok":
            method = DPOK(DPOKConfig())
        else:  # its unit of reward is the deviation
            kl = 1 / (BETA * float(data.rewards.std(correction=0)))
            method = GRPO(GRPOConfig(advantage_clip=None, fraction=1, kl=kl))
        gradient, error = chunk_gradients(core, method, method.prepare(core, data))
        found.append(float((gradient / error).abs().max()))
    assert found[0] < 4
    assert found[1] > 8


def test_group_advantages():
    prompts, rewards = ["a", "b", "a", "a", "c"], torch.tensor([1.0, 5.0, 2.0, 6.0, 7.0])
    assert torch.allclose(group_baseline(prompts, rewards), torch.tensor([4.0, 0.0, 3.5, 1.5, 0.0]))
    deviation = (14 / 3) ** 0.5
    expected = torch.tensor([-2 / deviation, 0.0, -1 / deviation, 3 / deviation, 0.0])
    assert torch.allclose(group_normalised(prompts, rewards), expected, atol=1e-5)


# The prior's network beside the finetuned one -----------------------------------------------------------------------


def test_checkpointing_changes_no_gradient(pipeline_folder):
    """The prior's vjp must run through the prior again, also when both networks share one graph."""
    found = []
    for checkpointing in (False, True):
        model = pipeline_model(pipeline_folder, checkpointing=checkpointing)
        perturb(model)
        meter = Meter()
        meter.watch(model.network)
        rng = generator(0, "weights", "checkpointing")
        z, a, b = (torch.from_numpy(rng.standard_normal((2, 4, 8, 8), "float32")) for _ in range(3))
        t, text, weights = torch.tensor([100, 700]), model.encode(["cat", "dog"]), list(model.adapters().values())

        def outcome(policy: bool, prior: bool, model=model, z=z, a=a, b=b, t=t, text=text, weights=weights):
            z = z.clone().requires_grad_()
            outputs = [model.predict(z, t, text, prior=p) for p, used in ((False, policy), (True, prior)) if used]
            value = sum((x * y).sum() for x, y in zip(outputs, (a, b) if policy else (b,), strict=False))
            inputs = [z, *weights] if policy else [z]
            return [*outputs, *torch.autograd.grad(value, inputs)]

        both, policy, prior = outcome(True, True), outcome(True, False), outcome(False, True)
        assert meter.network_forwards == (4 * 4 * 2 if checkpointing else 4 * 4)  # it does run again
        assert torch.allclose(both[2], policy[1] + prior[1], rtol=1e-4, atol=1e-5)  # gradients in z add up
        assert all(torch.equal(x, y) for x, y in zip(both[3:], policy[2:], strict=True))  # the prior moves no weight
        assert not torch.allclose(policy[0], prior[0], rtol=1e-2)
        found.append([*both, *policy, *prior])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


# The lean adjoint as the flow's target ------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_nabla_on_the_adjoint_vanishes_at_the_optimum_and_nowhere_near(path, eta):
    core = gaussian_core(8, path=path, eta=eta)
    method = NablaGFNAdjoint(NablaGFNAdjoint.Config(weighting="score", fraction=1))
    set_optimum(core, method)
    times, flow = places(core).tolist(), core.networks["flow"]
    tables = [(table, times) for table in core.model.adapters().values()]
    tables += [(flow.bias, [*times, 0]), (flow.slope, [*times, 0])]
    for data in (sample(core, 16), sample(core, 16, prior=True)):
        losses_and_departures(core, method, data, tables)


def test_without_the_last_reverse_loss_the_optimum_is_not_identified():
    """The public code's choice: policies at any share of the shift then have zero loss, so nothing is learned."""

    class LastLeftOut(NablaGFNPublished):
        def transition_losses(self, core, part):
            losses, rewards = super().transition_losses(core, part)
            return losses | {"reverse": losses["reverse"].index_fill(0, part.finished, 0)}, rewards

    core = gaussian_core(8)
    truth, steps = truth_of(core), core.kernel.steps
    look = truth.look[:, None] * gammas(core, "alpha")[:, None] * BETA * DIRECTION
    for share in (0.0, 0.5, 1.0, 1.7):
        flow = [share * truth.flow[steps - 1]]  # any value at K−1, carried back by the remaining equations
        for k in reversed(range(steps - 1)):
            flow.insert(0, truth.jacobian[k] * flow[0])
        drift = torch.stack([*flow[1:], truth.flow[-1]])
        shift_policy(core, drift)
        zeros = []
        for method_class in (LastLeftOut, NablaGFNPublished):
            method = method_class(method_class.Config(weighting="kl", fraction=1))
            core.networks.update(method.networks(core.model))
            core.networks["flow"].bias.data[places(core)] = torch.stack(flow) - look[:-1]
            data = sample(core, 16)
            zeros.append(sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data))
        reached = (moments(core)[0] - moments(core, prior=True)[0])[0]
        assert zeros[0] < 1e-10
        assert (zeros[1] < 1e-10) == (share == 1.0)
        if share in (0.0, 1.7):
            shift_policy(core, truth.flow[1:])
            asked = (moments(core)[0] - moments(core, prior=True)[0])[0]
            assert abs(reached / asked - 1) > 0.5


# Training -----------------------------------------------------------------------------------------------------------

SCORE = {"fraction": 1, "weighting": "score"}


@PATHS
@pytest.mark.parametrize(
    ("method", "updates", "rates", "flow_rates"),  # of the policy and of the method's network
    [
        (NablaGFN(NablaGFN.Config(**SCORE)), 500, (1e-2, 1e-2), (2e-2, 4e-2)),
        (NablaGFNPublished(NablaGFNPublished.Config(**SCORE, trust=0.0)), 500, (1e-2, 1e-2), (2e-2, 4e-2)),
        (NablaGFNAdjoint(NablaGFNAdjoint.Config(fraction=1)), 150, (1e-2, 1e-2), (4e-2, 2e-2)),
        (AdjointMatching(AdjointMatchingConfig(fraction=1)), 200, (1e-2, None), (2e-2, None)),
        (ResDB(ResDBConfig()), 900, (3e-3, 0.1), (6e-3, 0.1)),
        (RTB(RTBConfig()), 750, (1e-2, 5e-2), (2e-2, 5e-2)),
    ],
    ids=[
        "nabla_gfn",
        "nabla_gfn_published",
        "nabla_gfn_adjoint",
        "adjoint_matching",
        "res_db",
        "rtb",
    ],
)
def test_training_reaches_the_target(path, method, updates, rates, flow_rates):
    """From the prior, a method's own losses reach the tilted mean (5 % of the shift) and leave the variance alone."""
    core = gaussian_core(6, path=path)
    core = replace(core, micro_batch=1024)
    core.networks.update(method.networks(core.model))
    # a velocity moves a step's mean by less than a noise does, so that its rates are higher
    rate, network_rate = flow_rates if path == "flow" else rates
    groups = [{"params": list(core.model.adapters().values()), "lr": rate}]
    groups += [{"params": list(net.parameters()), "lr": network_rate} for net in core.networks.values()]
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, 2 * (1 - update / updates)))
    for update in range(updates):
        data = sample(core, 32, first=32 * update)
        if method.needs.rewards:
            data = with_rewards(core, data)
        optimizer.zero_grad()
        for loss in method.losses(core, data):
            (loss.values.sum() / len(data)).backward()
        optimizer.step()
        decay.step()
    (mean, variance), (prior_mean, prior_variance) = moments(core), moments(core, prior=True)
    asked = BETA * DIRECTION * (prior_variance - truth_of(core).jacobian.prod() ** 2)
    assert torch.allclose(mean - prior_mean, asked, rtol=0.05)
    assert torch.allclose(variance, prior_variance, rtol=0.05)
