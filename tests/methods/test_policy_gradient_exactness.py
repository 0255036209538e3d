"""Policy gradients against mathematics: score-function identities, ratios, clipping."""

from dataclasses import replace

import pytest
import torch
from bench.methods.backprop.draft import DRaFT1, DRaFTFull
from bench.methods.policy_gradient.ddpo import DDPO, DDPOConfig
from bench.methods.policy_gradient.dpok import DPOK, DPOKConfig
from bench.methods.policy_gradient.grpo import GRPO, GRPOConfig
from linear_gaussian import everything, places, shift_policy, truth_of
from scaffold import gradients, sample, with_rewards
from torch import Tensor

from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, DIRECTION, Wavy, gaussian_core
from bench.method import Method
from bench.sampling.trajectory import Batch


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
    kind = {"last": DRaFT1, "all": DRaFTFull}[depth]
    draft = kind(kind.Config())
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
