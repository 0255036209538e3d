"""The losses of the ∇-GFlowNet methods against their equations, each written down with log-densities and autograd."""

from dataclasses import replace

import pytest
import torch
from bench.methods.nabla.adjoint import NablaGFNAdjoint
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaDB, NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN, NablaGFNNoFlow
from linear_gaussian import PATHS, everything, losses_and_departures, places, shift_policy, truth_of
from scaffold import (
    gradients,
    sample,
    trainer_of,
)
from torch import Tensor

from bench.core import Core
from bench.diagnose.selftest.scaffold import (
    BETA,
    DIRECTION,
    Wavy,
    gaussian_core,
    moments,
    perturb,
    perturb_networks,
    update,
)
from bench.method import Loss
from bench.sampling.kernel import gaussian_log_prob
from bench.sampling.trajectory import Trajectory, Transitions

METHODS = [NablaGFN, NablaGFNNoFlow, NablaGFNPublished, NablaGFNAdjoint, NablaDB]


class Equations:
    """What the equations hold of one transition `z_k → z_{k+1}` of one trajectory; every state is [1, d]."""

    def __init__(self, core: Core, data: Trajectory, row: int, gamma: str):
        self.core, self.gamma, self.steps = core, gamma, core.kernel.steps
        self.data, self.row, self.conditioning = data, row, data.conditioning[row : row + 1]

    def state(self, k: int) -> Tensor:
        return self.data.latents[self.row, k][None].clone().requires_grad_()

    def output(self, z: Tensor, k: int, prior: bool = False) -> Tensor:
        return self.core.predict(z, k, self.conditioning, prior=prior)

    def mean(self, z: Tensor, k: int, prior: bool = False) -> Tensor:
        return self.core.kernel.mean(z, self.output(z, k, prior), k)

    def variance(self, k: int) -> Tensor:
        return self.core.kernel.std(k, self.state(k)) ** 2

    def log_prob(self, z: Tensor, z_next: Tensor, k: int, prior: bool = False) -> Tensor:
        """`log p_θ(z_{k+1}|z_k)`, or the prior's."""
        return gaussian_log_prob(z_next, self.mean(z, k, prior), self.core.kernel.std(k, z))

    def log_noising(self, z: Tensor, z_next: Tensor, k: int) -> Tensor:
        """`log p_B(z_k|z_{k+1})`."""
        return gaussian_log_prob(z, *self.core.kernel.noising(z_next, k))

    def reward_score(self, k: int) -> Tensor:
        z = self.state(k)
        clean = z if k == self.steps else self.core.kernel.clean(z, self.output(z, k), k)
        alpha = self.core.kernel.alphas_cumprod[k]
        gamma = {"alpha": alpha, "sqrt_alpha": alpha**0.5, "one": 1.0}[self.gamma] if k < self.steps else 1.0
        return BETA * gamma * torch.autograd.grad(self.core.reward_model(clean, [""]).sum(), z)[0]

    def flow(self, k: int) -> Tensor:
        return self.core.network("flow", self.state(k), torch.tensor([k]), self.conditioning)

    def flow_score(self, k: int, network: bool = True) -> Tensor:
        """`∇ log F̃(z_k)`."""
        return self.reward_score(k) + (self.flow(k) if network and k < self.steps else 0)

    def forward(self, k: int, plain: bool = False) -> Tensor:
        """`∇_{z_{k+1}} log p_θ/p_#`, or `log p_θ/p_B`."""
        z, z_next = self.state(k), self.state(k + 1)
        reference = self.log_noising(z, z_next, k) if plain else self.log_prob(z, z_next, k, prior=True)
        return torch.autograd.grad((self.log_prob(z, z_next, k) - reference).sum(), z_next)[0]

    def reverse(self, k: int, z_next: Tensor, plain: bool = False) -> Tensor:
        """`∇_{z_k} log p_θ/p_#`, or `log p_θ/p_B`."""
        z = self.state(k)
        reference = self.log_noising(z, z_next, k) if plain else self.log_prob(z, z_next, k, prior=True)
        return torch.autograd.grad((self.log_prob(z, z_next, k) - reference).sum(), z)[0]

    def expected_reverse(self, k: int) -> Tensor:
        """Its mean over `z_{k+1} ~ p_θ`; linear in `z_{k+1}`, so its value at the policy's mean."""
        return self.reverse(k, self.mean(self.state(k), k).detach())

    def adjoint(self, k: int) -> Tensor:
        """`−β ∇_{z_k} r(z_K)` along the prior's chain with the noise of this trajectory."""
        first = z = self.state(k)
        for j in range(k, self.steps):
            noise = self.state(j + 1) - self.mean(self.state(j), j, prior=True)
            z = self.mean(z, j, prior=True) + noise.detach()
        return -BETA * torch.autograd.grad(self.core.reward_model(z, [""]).sum(), first)[0]


def expected(method: NablaMethod, equations: Equations, k: int) -> dict[str, Tensor]:
    """The losses of the transition from step k, as the docstring of the method's class has them."""
    config, plain = method.config, isinstance(method, NablaDB) and not isinstance(method, NablaGFNPublished)
    last, has_flow = k + 1 == equations.steps, not isinstance(method, NablaGFNNoFlow)

    def weight(j: int) -> Tensor | float:
        return equations.variance(j) if config.weighting == "kl" else 1.0

    change = equations.output(equations.state(k), k) - equations.data.model_output[equations.row, k]
    forward = equations.forward(k, plain) - equations.flow_score(k + 1, has_flow)
    losses = {"forward": weight(k) * forward.square().mean(), "trust": config.trust * change.square().mean()}
    if not has_flow:
        return losses
    if isinstance(method, NablaGFNAdjoint):
        reverse = weight(k) * (equations.adjoint(k) + equations.flow_score(k)).square().mean()
    elif isinstance(method, NablaDB):
        balance = equations.reverse(k, equations.state(k + 1), plain) + equations.flow_score(k)
        reverse = weight(k) * balance.square().mean()
    elif last:
        reverse = torch.zeros(())
    else:
        balance = equations.expected_reverse(k + 1) + equations.flow_score(k + 1)
        reverse = weight(k + 1) * balance.square().mean()
    terminal = equations.flow(equations.steps).square().mean() if last else torch.zeros(())
    return losses | {"reverse": config.reverse_weight * reverse, "terminal": terminal}


@pytest.mark.parametrize("path", ["diffusion", "flow"])
@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize(("gamma", "weighting"), [("alpha", "kl"), ("sqrt_alpha", "score"), ("one", "kl")])
def test_losses_are_those_of_the_equations(path, method_class, gamma, weighting):
    options = {"gamma": gamma, "weighting": weighting, "trust": 0.3, "fraction": 1}
    options |= {} if method_class is NablaGFNNoFlow else {"reverse_weight": 0.7}
    method = method_class(method_class.Config(**options))
    core = gaussian_core(4, Wavy, path=path)
    core.networks.update(method.networks(core.model))
    data, generator = sample(core, 3), torch.Generator().manual_seed(0)
    for parameter in [
        *core.model.adapters().values(),
        *(p for net in core.networks.values() for p in net.parameters()),
    ]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    steps, found, micro_loss = method.steps(core, data), [], method.micro_loss

    def keep(part: Transitions, steps: Tensor, losses: dict[str, Tensor], rewards: Tensor) -> Loss:
        found.append((part, losses))
        return micro_loss(part, steps, losses, rewards)

    method.micro_loss = keep
    total = sum(loss.values.sum() for loss in method.losses(core, data))
    assert total.item() == pytest.approx(sum(sum(losses.values()).sum().item() for _, losses in found) / 4, rel=1e-12)
    assert steps.shape == (3, 4)
    for part, losses in found:
        for i, (row, k) in enumerate(zip(part.row.tolist(), part.k.tolist(), strict=True)):
            by_hand = expected(method, Equations(core, data, row, gamma), k)
            assert losses.keys() == by_hand.keys()
            for name, value in by_hand.items():
                assert losses[name][i].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), (name, k)


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


@PATHS
def test_closed_form_of_the_optimum(path):
    # μ* = μ_# + σ² b_{k+1} tilts the prior's samples by exp(β w·x), up to the noise z_0, which is not tilted.
    core = gaussian_core(10, path=path)
    truth = truth_of(core)
    prior_mean, prior_variance = moments(core, prior=True)[:2]
    leak = truth.jacobian.prod() ** 2
    shift_policy(core, truth.flow[1:])
    mean, variance = moments(core)[:2]
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


@pytest.mark.parametrize("method_class", [NablaGFN, NablaGFNAdjoint, NablaGFNPublished, NablaDB])
def test_reverse_loss_trains_the_flow_alone(method_class, core, tmp_path):
    found = []
    for weight in (0.0, 1.0):
        method = method_class(method_class.Config(fraction=1, channels=[16, 16], reverse_weight=weight))
        trainer = trainer_of(core, method, tmp_path)
        if not found:
            perturb(core.model)
            data = trainer.sample_round(0)
        perturb_networks(core)
        found.append(update(core, method, data))
    (without, a), (with_reverse, b) = found
    assert with_reverse > without
    adapters = core.model.adapters()
    assert all(torch.equal(a[key], b[key]) for key in adapters)
    assert any(not torch.equal(a[key], b[key]) for key in a if key not in adapters)


def forward_alone(method_class: type[NablaMethod], **options) -> NablaMethod:
    """The method with its forward loss as the only one."""

    class ForwardAlone(method_class):
        def micro_loss(self, part, steps, losses, rewards):
            return super().micro_loss(part, steps, {"forward": losses["forward"]}, rewards)

    return ForwardAlone(method_class.Config(channels=[16, 16], fraction=1, **options))


@pytest.mark.parametrize("method_class", [NablaGFN, NablaGFNAdjoint, NablaDB, NablaGFNPublished])
def test_the_forward_loss_trains_the_flow_in_the_published_setting_alone(method_class, core, tmp_path):
    method = forward_alone(method_class)
    data = trainer_of(core, method, tmp_path).sample_round(0)
    perturb(core.model)
    perturb_networks(core)
    _, gradients = update(core, method, data)
    assert any(g.any() for key, g in gradients.items() if key.startswith("flow.")) == (
        method_class is NablaGFNPublished
    )


def test_a_detached_target_changes_no_loss_and_no_gradient_of_the_policy(core, tmp_path):
    methods = [forward_alone(NablaGFNPublished, detach_target=detach) for detach in (True, False)]
    data = trainer_of(core, methods[0], tmp_path).sample_round(0)
    perturb(core.model)
    perturb_networks(core)
    (loss, detached), (again, attached) = (update(core, method, data) for method in methods)
    assert loss == again
    assert all(torch.equal(detached[key], attached[key]) for key in core.model.adapters())
