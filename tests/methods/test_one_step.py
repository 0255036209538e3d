"""TempFlow-GRPO and Flash-GRPO: which steps have noise, what is shared, and the size of the gradient."""

from dataclasses import replace

import pytest
import torch
from bench.methods.policy_gradient.flash_grpo import FlashGRPO, FlashGRPOConfig, deviations_of_output
from bench.methods.policy_gradient.one_step import OneStep
from bench.methods.policy_gradient.tempflow_grpo import TempFlowGRPO, TempFlowGRPOConfig
from golden_numbers import TOLERANCE, double, error, golden
from linear_gaussian import PATHS, places
from scaffold import gradients, with_rewards
from torch import Tensor

from bench.core import Core
from bench.diagnose.selftest.scaffold import DIRECTION, gaussian_core
from bench.sampling.kernel import Kernel
from bench.sampling.trajectory import Trajectory
from bench.training.advantages import group_mean

METHODS = {"tempflow_grpo": TempFlowGRPO(TempFlowGRPOConfig(branches=2)), "flash_grpo": FlashGRPO(FlashGRPOConfig())}
EACH_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def round_of(core: Core, method: OneStep, prompts: int, each: int, number: int = 0) -> Trajectory:
    with torch.no_grad():
        batch = core.batch((f"prompt {i}", j) for i in range(prompts) for j in range(each))
        return with_rewards(core, method.collect(core, batch, number))


@EACH_METHOD
def test_a_prompt_has_one_step_of_the_pool_in_every_round(method):
    core = gaussian_core(6, path="flow")
    batch = core.batch((f"prompt {i}", j) for i in range(40) for j in range(3))
    found = set()
    for number in range(2):
        steps = method.drawn(core, batch, number).view(40, 3)
        assert (steps == steps[:, :1]).all()
        found.add(tuple(steps[:, 0].tolist()))
    pool = {"tempflow_grpo": range(5), "flash_grpo": range(3)}[next(n for n, m in METHODS.items() if m is method)]
    assert len(found) == 2 and set().union(*found) == set(pool)


@EACH_METHOD
def test_the_rows_of_a_round_are_in_order_and_noisy_where_they_say(method):
    """A prompt's are as sampled alone; from the end of its step on each follows the step without noise."""
    core = gaussian_core(6, path="flow")
    data = round_of(core, method, 6, 3)
    assert data.noisy.tolist() == method.drawn(core, data, 0)[:, None].tolist()
    assert torch.equal(method.steps(core, data), data.noisy)
    for row, k in enumerate(data.noisy.flatten().tolist()):
        group = [name for name in data.samples if name[0] == data.prompts[row]]
        alone = method.collect(core, core.batch(group), 0).latents
        torch.testing.assert_close(data.latents[row], alone[group.index(data.samples[row])])
        quiet = replace(core.kernel, noisy=(k, k + 1))
        for j in range(data.steps):
            z = data.latents[row : row + 1, j]
            mean = quiet.mean(z, core.predict(z, j, data.conditioning[:1]), j)
            assert torch.allclose(mean, data.latents[row, j + 1]) == (j != k)


def test_branches_share_all_that_comes_before_their_step():
    core, method = gaussian_core(6, path="flow"), METHODS["tempflow_grpo"]
    data = round_of(core, method, 3, 4)
    for first in (0, 4, 8):
        k = int(data.noisy[first])
        one, two, other = (data.latents[first + i] for i in (0, 1, 2))
        assert torch.equal(one[: k + 1], two[: k + 1]) and not torch.equal(one[0], other[0])
        assert (one[k + 1 :] != two[k + 1 :]).all()
    again = round_of(core, method, 3, 4, 1)
    assert torch.equal(data.latents[:, 0], again.latents[:, 0])  # of the same samples; a next round has others


def test_branches_end_with_their_round():
    """A group that 6 does not divide: no two rounds share a noise, although numbers go on from round to round."""
    core, method = gaussian_core(6, path="flow"), TempFlowGRPO(TempFlowGRPOConfig())
    starts = [method.start(core.batch(("a", i) for i in range(first, first + 8))) for first in (0, 8)]
    assert [[name for _, name in names] for names in starts] == [[0] * 6 + [6] * 2, [8] * 6 + [14] * 2]


@PATHS
def test_tempflow_expects_the_gradient_of_its_step(path):
    """For a linear reward, of μ_k: `−a σ_k (1 − 1/n) w Π_{j>k} J_j / d`, with the slopes J_j of steps without noise."""
    core, each, prompts = gaussian_core(4, path=path), 4, 1500
    method = TempFlowGRPO(TempFlowGRPOConfig(branches=each, advantage_clip=None))
    core = replace(core, micro_batch=100_000)
    data = round_of(core, method, prompts, each)
    data = replace(data, advantages=data.rewards - group_mean(data.prompts, data.rewards))
    bias, chunks = core.model.adapters()["bias"], []
    for part in data.split(300):
        losses = list(method.losses(core, part))
        assert all(torch.equal(loss.metrics["log_ratio"], torch.zeros(300).double()) for loss in losses)
        gradients(losses, len(part), [bias])
        chunks.append(bias.grad[places(core)].flatten())
    stacked, z = torch.stack(chunks), torch.zeros(1, 2, dtype=torch.float64)
    expected: list[Tensor] = []
    for k in range(3):
        quiet, text = replace(core.kernel, noisy=(k, k + 1)), core.model.encode([""])
        slope = torch.ones(())
        for j in range(k + 1, 4):
            low, high = (quiet.mean(z + x, core.predict(z + x, j, text).detach(), j)[0, 0] for x in (0, 1))
            slope = slope * (high - low)
        share = float((data.noisy == k).double().mean())
        gain = core.kernel.mean(z, z + 1, k)[0, 0]
        weight = 2.25 * float(core.kernel.std(k, z))
        expected.append(-share * weight * (1 - 1 / each) * slope * gain * DIRECTION / 2)
    expected.append(torch.zeros(2))
    deviation = stacked.std(0) / len(stacked) ** 0.5
    assert ((stacked.mean(0) - torch.cat(expected)).abs() <= 4 * deviation).all()
    assert deviation.norm() < 0.1 * torch.cat(expected).norm()  # Monte Carlo


@PATHS
def test_flash_weights_make_every_step_count_alike(path):
    """The weighted log-density's gradient in the output has the deviation `c_k |∂μ/∂o| / σ_k` at every step."""
    core, method = gaussian_core(6, path=path), FlashGRPO(FlashGRPOConfig(pool=1))
    k, like = torch.arange(6), torch.zeros(6, 2, dtype=torch.float64)
    weight = method.weight(core, k, like)
    deviation = weight * core.kernel.mean(like, like + 1, k)[:, 0].abs() / core.kernel.std(k, like)[:, 0]
    torch.testing.assert_close(deviation, deviation[:1].expand(6), rtol=1e-10, atol=0)
    assert float(weight.mean()) == pytest.approx(1)
    half = FlashGRPO(FlashGRPOConfig(pool=0.5)).weight(core, k, like)
    assert float(half[:3].mean()) == pytest.approx(1)


def test_flash_weights_are_the_published_ones():
    theirs = golden("item16_flash_grpo")
    sigmas = double(theirs["sigmas"])
    core = gaussian_core(2, path="flow")
    ours = []
    for k, rate in enumerate(theirs["std_dev_t"]):
        kernel = Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, rate, "dance", "flow", sigmas)
        ours.append(deviations_of_output(replace(core, kernel=kernel), k, torch.zeros(1, 2, dtype=torch.float64)))
    assert error(torch.cat(ours)[None], [theirs["coefficients"]]) < TOLERANCE
    weights = torch.cat(ours)[: theirs["pool"]]
    assert error((weights / weights.mean())[None], [theirs["weights"]]) < TOLERANCE
