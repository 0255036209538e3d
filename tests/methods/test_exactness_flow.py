"""The newer methods against mathematics: whole-group gradients, the value's equation; float64."""

from dataclasses import replace

import torch
from bench.methods.online_dpo import OnlineDPO, OnlineDPOConfig
from scaffold import Wavy, gaussian_core, gradients, with_rewards


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
