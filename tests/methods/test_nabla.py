"""The losses of the ∇-GFlowNet methods against their equations, each written down with log-densities and autograd."""

import pytest
import torch
from bench.methods.nabla.adjoint import NablaGFNAdjoint
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaDB, NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN, NablaGFNNoFlow
from scaffold import BETA, Wavy, gaussian_core, sample
from torch import Tensor

from bench.core import Core
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
