"""The newer methods against mathematics: whole-group gradients, leaps, the value's equation; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.draft import DRaFT, DRaFTConfig
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from scaffold import Wavy, gaussian_core, gradients, with_rewards

from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.options import Config
from bench.sampling.kernel import flow_kernel


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
