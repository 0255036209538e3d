"""Online DPO: its loss against the equation, pair by pair, and groups without a pair; float64."""

from dataclasses import replace

import pytest
import torch
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from scaffold import gradients, with_rewards

from bench.core import Core
from bench.diagnose.selftest.scaffold import Wavy, gaussian_core
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Trajectory


def round_of(core: Core) -> Trajectory:
    """Four samples of each of two prompts; the policy differs from the prior."""
    core.model.adapters()["bias"].data[core.kernel.timesteps] = 0.1
    batch = core.batch((prompt, i) for prompt in "ab" for i in range(4))
    with torch.no_grad():
        return with_rewards(core, core.rollout(batch))


@pytest.mark.parametrize("micro_batch", [1, 6, 64])
def test_the_loss_is_that_of_the_equation(micro_batch):
    core = replace(gaussian_core(6, Wavy), micro_batch=micro_batch)
    data, strength = round_of(core), 10.0
    method, weights = OnlineDPO(OnlineDPOConfig(fraction=0.5, strength=strength)), core.model.adapters().values()
    steps, expected = method.steps(core, data), torch.zeros((), dtype=torch.float64)
    assert steps.shape == (8, 3)
    assert {k for row in steps.tolist() for k in row} == set(range(6))
    draw = Noise(core.seed, "renoise", data.samples)
    noises = [draw(column, core.model.latent_shape).double() for column in range(3)]
    for i, group in enumerate([slice(0, 4)] * 4 + [slice(4, 8)] * 4):
        samples, rewards = data.latents[group, -1], data.rewards[group]
        for k, noise in zip(steps[i].tolist(), noises, strict=True):
            gains = []  # of the policy's error over the prior's, winner then loser
            for x in (samples[rewards.argmax()], samples[rewards.argmin()]):
                z, u = core.kernel.noised(x, noise[i], k)[None], core.kernel.target(x, noise[i], k)[None]
                policy, prior = (core.predict(z, k, data.conditioning[i : i + 1], prior=p) for p in (False, True))
                gains.append((policy - u).square().mean() - (prior - u).square().mean())
            expected = expected - torch.nn.functional.logsigmoid(-strength / 2 * (gains[0] - gains[1])) / 3 / 8
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(weights))])
    rows, predict = [], core.model.predict
    core.model.predict = lambda z, *args, **options: rows.append(len(z)) or predict(z, *args, **options)
    ours, gradient = gradients(method.losses(core, method.prepare(core, data)), 8, weights)
    assert ours == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, theirs)
    assert theirs.any()
    assert max(rows) <= max(micro_batch, 2)


def test_preferences_of_equal_rewards_teach_nothing():
    core = gaussian_core(4, Wavy)
    data, seen = round_of(core), []
    method = OnlineDPO(OnlineDPOConfig(fraction=1, strength=10))
    for rewards in (data.rewards, torch.cat([torch.ones(4), data.rewards[4:]]), torch.ones(8)):
        pairs = method.prepare(core, replace(data, rewards=rewards.double()))
        loss, gradient = gradients(method.losses(core, pairs), 8, core.model.adapters().values())
        tied = torch.cat([loss.metrics["tied"] for loss in method.losses(core, pairs)]).mean()
        seen.append((float(gradient.norm()), float(tied), loss))
        winners = torch.stack([data.latents[:4, -1][rewards[:4].argmax()], data.latents[4:, -1][rewards[4:].argmax()]])
        assert torch.equal(pairs.latents[:, 1], winners.repeat_interleave(4, 0))
    assert [tied for _, tied, _ in seen] == [0.0, 0.5, 1.0]
    assert seen[0][0] > 0
    assert seen[1][0] > 0
    assert seen[2][0] == seen[2][2] == 0
