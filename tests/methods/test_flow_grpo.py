"""The policy-gradient family on a flow whose law is known: ratios, the KL term, windows, shared starts."""

from dataclasses import replace

import pytest
import torch
from bench.methods.flow_grpo import FlowGRPO, FlowGRPOConfig
from bench.rewards.linear import Linear

from bench import registry
from bench.core import Core
from bench.models.analytic import GaussianFlowModel
from bench.sampling.grids import flow_kernel
from bench.sampling.trajectory import Trajectory

PRESETS = ("flow_grpo", "flow_grpo_cps", "dance_grpo", "mix_grpo", "grpo_guard", "flow_dppo")
RULES = {"flow_grpo_cps": ("cps", 0.7), "dance_grpo": ("dance", 0.3)}


def method_of(name: str, **changes: object) -> FlowGRPO:
    preset = registry.BUILT_IN["methods"][name].preset
    options = {key.removeprefix("method."): v for key, v in preset.items() if key.startswith("method.")}
    return FlowGRPO(FlowGRPOConfig(**options | changes))


def core_of(name: str) -> Core:
    model = GaussianFlowModel(2, (0.7, -0.2), 0.6, dtype=torch.float64)
    rule, eta = RULES.get(name, ("euler", 0.7))
    core = Core(model, flow_kernel(6, rule=rule, eta=eta, dtype=torch.float64), Linear(Linear.Config()), 1.0)
    model.adapters()["bias"].data[:] = 0.1
    return core


def data_of(core: Core, method: FlowGRPO, number: int = 0) -> Trajectory:
    batch = core.batch((prompt, i) for prompt in "ab" for i in range(4))
    with torch.no_grad():
        data = method.collect(core, batch, number)
    return method.prepare(core, replace(data, rewards=core.reward(data.latents[:, -1], data.prompts).detach()))


def gradient(core: Core, method: FlowGRPO, data: Trajectory) -> torch.Tensor:
    bias = core.model.adapters()["bias"]
    bias.grad = None
    sum(loss.values.sum() for loss in method.losses(core, data)).backward()
    return bias.grad


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_ratios_are_one_and_a_divergence_changes_the_gradient(name):
    core, found = core_of(name), []
    for weight in (0.0, 1.0):
        method = method_of(name, kl=weight, advantage_clip=1.0)
        data = data_of(core, method)
        for loss in method.losses(core, data):
            assert not loss.metrics["log_ratio"].any()
            assert not loss.metrics["clipped"].any()
        found.append(gradient(core, method, data))
    assert found[0].any()
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


def test_the_last_step_is_never_trained_unless_asked_for():
    core = core_of("flow_grpo")
    places = core.kernel.timesteps.round().long()
    for asked in (False, True):
        method = method_of("flow_grpo", train_last=asked)
        rows = gradient(core, method, data_of(core, method))[places].any(1)
        assert rows.tolist() == [True] * 5 + [asked]


def test_a_window_of_noise_moves_and_trains_alone():
    core = core_of("mix_grpo")
    places, found = core.kernel.timesteps.round().long(), []
    for number in (0, 2, 3, 9, 12):
        method = method_of("mix_grpo", window=2, window_rounds=3)
        data = data_of(core, method, number)
        first = (number // 3) % 4
        found.append(first)
        outputs, z = data.model_output, data.latents
        for k in range(6):
            mean = core.kernel.mean(z[:, k], outputs[:, k], k)
            level, after = core.kernel.sigmas[k], core.kernel.sigmas[k + 1]
            straight = z[:, k] + (after - level) * outputs[:, k]
            noisy = first <= k < first + 2
            assert torch.allclose(z[:, k + 1], straight, atol=1e-12) != noisy
            if noisy:  # the draw is one of the full sampler's
                scores = (z[:, k + 1] - mean) / core.kernel.std(k, mean)
                assert 0.2 < scores.std() < 2
        assert data[2:5].noisy.tolist() == [[first, first + 1]] * 3
        rows = gradient(core, method, data[:4])[places].any(1).nonzero().flatten()
        assert rows.tolist() == [first, first + 1]
    assert found == [0, 0, 1, 3, 0]


def test_one_start_for_the_samples_of_a_prompt():
    core = core_of("dance_grpo")
    starts = [data_of(core, method_of("dance_grpo"), number).latents[:, 0] for number in (0, 1)]
    for z in starts:
        assert torch.equal(z[:4], z[:1].expand(4, 2))
        assert torch.equal(z[4:], z[4:5].expand(4, 2))
        assert not torch.equal(z[0], z[4])
    assert not torch.equal(*starts)
    own = data_of(core, method_of("flow_grpo")).latents[:, 0]
    assert len(own.unique(dim=0)) == 8
