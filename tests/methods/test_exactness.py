"""The methods against mathematics: closed-form optima, score-function identities, finite differences; float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from bench.methods.adjoint_matching import AdjointMatching, AdjointMatchingConfig
from bench.methods.best_of_n import BestOfN, BestOfNConfig
from bench.methods.db import DB, DBConfig
from bench.methods.ddpo import DDPO, DDPOConfig
from bench.methods.draft import DRaFT, DRaFTConfig
from bench.methods.nabla.adjoint import NablaGFNAdjoint
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN, NablaGFNNoFlow
from bench.methods.refl import ReFL, ReFLConfig
from bench.methods.rtb import RTB, RTBConfig
from scaffold import BETA, DIRECTION, Wavy, gaussian_core, gradients, perturb, sample, with_rewards
from torch import Tensor, nn

from bench.core import Core
from bench.method import Method
from bench.models.stable_diffusion import StableDiffusion
from bench.runtime.meter import Meter
from bench.sampling.noise import Noise, generator
from bench.sampling.trajectory import Batch, Trajectory
from bench.training.advantages import group_baseline, group_normalised

PATHS = pytest.mark.parametrize("path", ["diffusion", "flow"])  # of every method that declares p*


def places(core: Core) -> Tensor:
    """Long [K]: where the tables of the affine networks hold the steps."""
    return core.kernel.timesteps.round().long()


@dataclass
class Truth:
    """What is known of the linear-Gaussian problem on a kernel's grid.

    variance: `σ_k²` [K]; jacobian: `J_k = ∂μ_#/∂z_k` [K]; gain: `∂μ/∂o` [K]; look: `∂ẑ_#/∂z_k` [K+1], 1 at K;
    flow: `b_k = ∇ log F̃(z_k)` [K+1, d].
    """

    variance: Tensor
    jacobian: Tensor
    gain: Tensor
    look: Tensor
    flow: Tensor


def truth_of(core: Core) -> Truth:
    """From the Gaussian's own formulas: with `α, s` the path's levels and `v` the data's variance, the noise's slope in
    z is `s / (α² v + s²)`, the clean latent's `α v / (α² v + s²)`."""
    alphas, flow = core.kernel.alphas_cumprod, core.model.output == "flow"
    alpha = alphas.sqrt()
    s = 1 - alpha if flow else (1 - alphas).sqrt()
    variance = core.kernel.std(torch.arange(core.kernel.steps), alphas) ** 2
    spread = alphas * core.model.std**2 + s**2
    noise, look = (s / spread)[:-1], (alpha * core.model.std**2 / spread)[:-1]
    ratio = s[1:] * alpha[:-1] / (s[:-1] * alpha[1:])
    side = s[1:] * (1 - core.kernel.eta**2 + (core.kernel.eta * ratio) ** 2).sqrt()
    jacobian = alpha[1:] * look + side * noise
    gradients = [BETA * DIRECTION]
    for j in jacobian.flip(0):
        gradients.insert(0, j * gradients[0])
    # v moves x̂ by −s and ε̂ by α; ε moves x̂ by −s/α and itself by 1
    gain = (alpha[:-1] * side - alpha[1:] * s[:-1]) / (1 if flow else alpha[:-1])
    return Truth(variance, jacobian, gain, torch.cat([look, torch.ones_like(look[:1])]), torch.stack(gradients))


def gammas(core: Core, kind: str) -> Tensor:
    alphas = core.kernel.alphas_cumprod
    gamma = {"alpha": alphas, "sqrt_alpha": alphas.sqrt(), "one": torch.ones_like(alphas)}[kind].clone()
    gamma[-1] = 1
    return gamma


def shift_policy(core: Core, drift: Tensor) -> None:
    """Make `μ_θ = μ_# + σ_k² drift_k`, drift [K, d]."""
    truth = truth_of(core)
    change = (truth.variance / truth.gain).unsqueeze(1) * drift
    core.model.adapters()["bias"].data[places(core)] = change


def set_optimum(core: Core, method: NablaMethod) -> None:
    """Plug in the optimal policy and, beside the forward-looking term, the exact rest of the flow's gradient."""
    truth = truth_of(core)
    shift_policy(core, truth.flow[1:])
    core.networks = method.networks(core.model)
    look = (gammas(core, method.config.gamma) * truth.look).unsqueeze(1) * BETA * DIRECTION
    core.networks["flow"].bias.data[places(core)] = (truth.flow - look)[:-1]


def moments(core: Core, prior: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance [d] of the final latent, exactly, by the recursion of an affine chain."""
    d, kernel = core.model.latent_shape[0], core.kernel
    mean, variance = torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)

    def step(z: Tensor, k: int) -> Tensor:
        return kernel.mean(z, core.predict(z, k, core.model.encode([""]), prior=prior), k)[0]

    with torch.no_grad():
        for k in range(kernel.steps):
            slope = step(torch.ones(1, d), k) - step(torch.zeros(1, d), k)
            mean = step(mean[None], k)
            variance = slope**2 * variance + kernel.std(k, mean[None]).squeeze() ** 2
    return mean, variance


def everything(core: Core) -> list[nn.Parameter]:
    return [*core.model.adapters().values(), *(p for net in core.networks.values() for p in net.parameters())]


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ddpo_gradient_of_one_step(reduction):
    """With one step and a linear reward, `∇_bias E[r] = ∂μ/∂ε w`; DDPO must expect `−∇ E[r] / std(r)`."""
    core, rows = gaussian_core(1, spacing="trailing"), 4096
    method = DDPO(DDPOConfig(reduction=reduction, fraction=1))
    data = with_rewards(core, sample(core, rows))
    deviation = data.rewards.std(correction=0)
    found, error = chunk_gradients(core, method, method.prepare(core, data))
    expected = -truth_of(core).gain[0] * DIRECTION / deviation / (2 if reduction == "mean" else 1)
    assert (error < 0.05 * expected.norm()).all()  # Monte Carlo: about 2 %
    assert ((found - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(("depth", "fraction"), [(1, 0.0), (0, 1.0)])
def test_ddpo_expects_the_gradient_that_draft_computes(depth, fraction):
    """Score function and reparameterisation are two estimators of `∇ E[r]`, of the last step and of all steps."""
    core, rows, steps = gaussian_core(4, Wavy, spacing="trailing", final=0.95), 2048, 4
    core.model.adapters()["bias"].data[places(core)] = 0.2
    ddpo, draft = DDPO(DDPOConfig(reduction="sum", fraction=fraction)), DRaFT(DRaFTConfig(depth=depth))
    data = ddpo.prepare(core, with_rewards(core, sample(core, rows)))
    score, score_error = chunk_gradients(core, ddpo, data)
    path, path_error = chunk_gradients(core, draft, core.batch(data.samples))
    # DDPO averages over steps and measures rewards in deviations.
    scale = data.rewards.std(correction=0) * (steps if fraction else 1)
    error = ((score_error * scale) ** 2 + path_error**2).sqrt()
    assert ((score * scale - path).abs() <= 4 * error).all()
    assert error.norm() < 0.1 * path.norm()  # Monte Carlo
    assert (path[:-2] != 0).all() == (depth == 0)


def test_ddpo_ratio_is_one_on_policy_and_clips_on_the_right_side_only():
    core, d, clip = gaussian_core(3), 2, 1e-4
    core.model.adapters()["bias"].data[places(core)] = 0.1
    core.micro_batch = 8
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
        kl = 1.0 if name == "dpok" else 1 / (BETA * float(data.rewards.std(correction=0)))  # GRPO's unit of reward
        kind = {"dpok": "reward", "grpo": "group"}[name]
        method = DDPO(DDPOConfig(advantage=kind, advantage_clip=None, reduction="sum", fraction=1, kl=kl))
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


# DRaFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 0])
def test_draft_gradient_is_the_derivative_of_the_reward(depth):
    """Central differences over every parameter of the last steps; nothing reaches the steps before them."""
    core, steps = gaussian_core(4, Wavy), 4
    method = DRaFT(DRaFTConfig(depth=depth))
    adapters = core.model.adapters()
    for table, value in zip(adapters.values(), (0.2, -0.1), strict=True):
        table.data[places(core)] = value
    batch = core.batch((f"prompt {i}", 0) for i in range(4))

    def loss() -> float:
        with torch.no_grad():
            z = core.rollout(batch).latents[:, -1]
            return -core.reward(z, batch.prompts).mean().item()

    total, _ = gradients(method.losses(core, batch), 4, everything(core))
    assert total == pytest.approx(loss(), rel=1e-12)
    for table in adapters.values():
        for k, t in enumerate(places(core).tolist()):
            for i in range(2):
                if k < steps - (depth or steps):
                    assert table.grad[t, i] == 0
                    continue
                before, h = table.data[t, i].item(), 1e-5
                table.data[t, i] = before + h
                above = loss()
                table.data[t, i] = before - h
                difference = (above - loss()) / (2 * h)
                table.data[t, i] = before
                assert table.grad[t, i].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)


# The prior's network beside the finetuned one -----------------------------------------------------------------------


def test_checkpointing_changes_no_gradient(pipeline_folder):
    """The prior's vjp must run through the prior again, also when both networks share one graph."""
    found = []
    for checkpointing in (False, True):
        model = StableDiffusion(pipeline_folder, guidance=3.0, lora_rank=2, checkpointing=checkpointing)
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


# Adjoint Matching ---------------------------------------------------------------------------------------------------


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
    adjoint, means, rewards = core.lean_adjoint(data)
    assert torch.equal(rewards, core.reward(data.latents[:, -1], data.prompts))
    for k in range(core.kernel.steps + 1):
        z = start = data.latents[:, k].clone().requires_grad_()
        for j in range(k, core.kernel.steps):  # the same noise, whatever the state
            mean = core.kernel.mean(z, core.predict(z, j, data.conditioning, prior=True), j)
            z = mean + data.latents[:, j + 1] - means[:, j]
        (gradient,) = torch.autograd.grad(core.reward(z, data.prompts).sum(), start)
        assert torch.allclose(adjoint[:, k], -BETA * gradient, rtol=1e-10)


# ReFL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [None, 0.5])
def test_refl_gradient_is_the_derivative_of_one_steps_reward(margin):
    """Central differences in the weights of the drawn step, at the state that was reached; nothing reaches others."""
    core, rows = gaussian_core(8, Wavy), 6
    method = ReFL(ReFLConfig(window=0.5, margin=margin, scale=0.1))
    adapters = core.model.adapters()
    for table, value in zip(adapters.values(), (0.2, -0.1), strict=True):
        table.data[places(core)] = value
    batch = core.batch((f"prompt {i}", 0) for i in range(rows))
    chosen = core.choose_late_step(batch, 0.5)
    assert chosen.min() >= 4
    assert len(chosen.unique()) > 1
    states = core.rollout(batch).latents[torch.arange(rows), chosen].detach()

    def loss() -> float:
        with torch.no_grad():
            clean = core.kernel.clean(states, core.predict(states, chosen, batch.conditioning), chosen)
            rewards = core.reward(clean, batch.prompts)
        return 0.1 * (-rewards if margin is None else (margin - rewards).clamp(min=0)).mean().item()

    total, _ = gradients(method.losses(core, batch), rows, everything(core))
    assert total == pytest.approx(loss(), rel=1e-12)
    for table in adapters.values():
        for k, t in enumerate(places(core).tolist()):
            for i in range(2):
                before, h = table.data[t, i].item(), 1e-5
                table.data[t, i] = before + h
                above = loss()
                table.data[t, i] = before - h
                difference = (above - loss()) / (2 * h)
                table.data[t, i] = before
                assert table.grad[t, i].item() == pytest.approx(difference, rel=1e-6, abs=1e-9), k
    assert table.grad[places(core)[:4]].abs().max() == 0


# The lean adjoint as the flow's target ------------------------------------------------------------------------------


def losses_and_departures(core: Core, method: Method, data: Trajectory, tables: list[tuple[Tensor, list[int]]]) -> None:
    """Loss and gradient are zero (1e-10) here, and the loss is positive after a step in any entry of the tables."""
    total, gradient = gradients(method.losses(core, data), len(data), everything(core))
    assert 0 <= total < 1e-10
    assert gradient.abs().max() < 1e-10
    for table, places in tables:
        for place in places:
            before = table.data[place].clone()
            table.data[place] += 0.1
            assert sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data) > 1e-6
            table.data[place] = before


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
            core.networks = method.networks(core.model)
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


# Balance without gradients -------------------------------------------------------------------------------------------


def set_balanced_flow(core: Core, method: DB) -> None:
    """The exact log-flow `b_k·z + c_k` beside the forward-looking term, at the optimal policy."""
    truth, times = truth_of(core), places(core)
    shift_policy(core, truth.flow[1:])
    core.networks = method.networks(core.model)
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


@PATHS
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_residual_db_vanishes_at_the_optimum_and_nowhere_near(path, eta):
    core = gaussian_core(8, path=path, eta=eta)
    method = DB(DBConfig(residual=True, reduction="sum", trust=0))
    set_balanced_flow(core, method)
    times, flow = places(core).tolist(), core.networks["flow"]
    tables = [(table, times) for table in (*core.model.adapters().values(), flow.bias, flow.slope)]
    for data in (sample(core, 16), sample(core, 16, prior=True)):
        losses_and_departures(core, method, data, tables)


def test_balance_of_some_transitions_knows_where_each_ends():
    core = gaussian_core(8)
    method = DB(DBConfig(residual=True, reduction="sum", trust=0, fraction=0.3))
    set_balanced_flow(core, method)
    losses = torch.cat([loss.values for loss in method.losses(core, sample(core, 16, prior=True))])
    assert len(losses) == 3 * 16
    assert losses.max() < 1e-18


def test_averaged_densities_have_another_target():
    """The same policy and flow under densities averaged over elements: the published reduction counts β d times."""
    core = gaussian_core(8)
    method = DB(DBConfig(residual=True, reduction="mean", trust=0))
    set_balanced_flow(core, method)
    data = sample(core, 16)
    assert sum(loss.values.sum().item() for loss in method.losses(core, data)) / len(data) > 1e-2


@pytest.mark.parametrize("micro_batch", [70, 20], ids=["a pass", "two passes"])
def test_dag_kl_gradients_go_where_they_belong(micro_batch):
    """The flow learns from the balance alone, the policy from the advantage alone, and A = −balance, left one out."""
    core = gaussian_core(6)
    core.micro_batch = micro_batch  # of 32 trajectories
    core.model.adapters()["bias"].data[places(core)] = 0.1
    data = sample(core, 32)
    method, balance_only = (DB(DBConfig(reduction="sum", trust=0, clip=0.2, policy_weight=w)) for w in (1.0, 1e-12))
    core.networks = method.networks(core.model)
    policy = list(core.model.adapters().values())
    total, gradient = gradients(method.losses(core, data), len(data), policy)
    known = core.beta * core.look_ahead(data, torch.ones(32, 7, dtype=torch.bool))
    (part,) = data.transitions(torch.arange(6).expand(32, 6), 1000)
    balance, log_prob = method.balance(core, part, core.predict(part.z, part.k, part.conditioning), known)
    table = balance.detach().view(6, 32)
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
    core.networks = method.networks(core.model)
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


# AlignProp and DRaFT-LV ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"start": (0.6, 0.2)}, {"depth": 1, "renoise": 2}], ids=["alignprop", "draft_lv"])
def test_truncated_backpropagation_against_finite_differences(options):
    """Central differences in the parameters of the steps with gradient, the rest of the chain held fixed."""
    core, rows, h = gaussian_core(5, Wavy), 6, 1e-5
    method, batch = DRaFT(DRaFTConfig(**options)), core.batch((f"prompt {i}", 0) for i in range(6))
    for table, value in zip(core.model.adapters().values(), (0.2, -0.1), strict=True):
        table.data[places(core)] = value
    fixed = core.rollout(batch).latents  # under the unmoved policy
    starts = method.starts(core, batch)
    assert len(set(starts.tolist())) > 1 or options.get("renoise")
    clean = fixed[:, -1]

    def loss() -> float:
        finals = []
        for i, start in enumerate(starts.tolist()):
            row = batch[i : i + 1]
            if options.get("renoise"):
                for copy in range(2):
                    noise = Noise(core.seed, "renoise", row.samples)(copy, (2,)).double()
                    mean, std = core.kernel.noising(clean[i : i + 1], start)
                    z = mean + std * noise
                    finals.append(core.kernel.mean(z, core.predict(z, start, row.conditioning), start))
                continue
            z, noise = fixed[i : i + 1, start], Noise(core.seed, "train", row.samples)
            for k in range(start, core.kernel.steps):
                mean = core.kernel.mean(z, core.predict(z, k, row.conditioning), k)
                z = mean + core.kernel.std(k, z) * noise(k + 1, (2,)).double()
            finals.append(z)
        with torch.no_grad():
            return -float(core.reward_model(torch.cat(finals), []).mean())

    total, _ = gradients(method.losses(core, batch), rows, everything(core))
    assert total == pytest.approx(loss(), rel=1e-12)
    for table in core.model.adapters().values():
        for k, t in enumerate(places(core).tolist()):
            for i in range(2):
                before = table.data[t, i].item()
                table.data[t, i] = before + h
                above = loss()
                table.data[t, i] = before - h
                difference = (above - loss()) / (2 * h)
                table.data[t, i] = before
                assert table.grad[t, i].item() == pytest.approx(difference, rel=1e-6, abs=1e-9), (k, i)
        assert table.grad[places(core)[-1]].any()
        assert not table.grad[places(core)[0]].any()


def test_alignprop_draws_the_published_steps():
    core = gaussian_core(50)
    batch = core.batch((f"prompt {i}", 0) for i in range(2000))
    starts = DRaFT(DRaFTConfig(start=(0.84, 0.1))).starts(core, batch).double()
    assert starts.min() >= 1
    assert starts.max() == 49
    assert starts.mean() == pytest.approx(41.2, abs=0.4)  # int(N(42, 5)), redrawn beyond 49


# Best of n ----------------------------------------------------------------------------------------------------------


def test_best_of_n_keeps_the_best_of_its_own_candidates():
    core, n = gaussian_core(4), 5
    batch = core.batch((f"prompt {i}", 0) for i in range(600))
    options = {"purpose": "evaluate", "seed": 3, "record": frozenset({"model_output", "prior_output"})}
    with torch.no_grad():
        own = core.rollout(batch, **options).latents[:, -1]
        core.micro_batch = core.sample_batch = 7  # the choice does not depend on how a batch is cut
        best = BestOfN(BestOfNConfig(n=n)).sample(core, batch, **options)
        alone = BestOfN(BestOfNConfig(n=1)).sample(core, batch, **options)
    assert best.model_output is None
    assert torch.equal(alone.latents[:, -1], own)
    rewards, kept = own @ DIRECTION, best.latents[:, -1] @ DIRECTION
    assert (kept >= rewards).all()
    assert 0.1 < (kept == rewards).double().mean() < 0.3  # the own noise wins one time in five
    normal = (kept - rewards.mean()) / rewards.std()
    assert normal.mean() == pytest.approx(1.163, abs=0.12)  # expected maximum of five standard normals


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
        (DB(DBConfig(residual=True, reduction="sum", trust=0)), 900, (3e-3, 0.1), (6e-3, 0.1)),
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
    core.micro_batch = 1024
    core.networks = method.networks(core.model)
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
