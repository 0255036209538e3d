"""Value matching: a linear reward on a Gaussian, where the value is known; and what a run stores."""

import pytest
import torch
from bench.methods.value_matching import ValueMatching, ValueMatchingConfig
from linear_gaussian import PATHS, Truth, truth_of
from scaffold import gradients, with_rewards

from bench.core import Core
from bench.diagnose.selftest.scaffold import BETA, gaussian_core
from bench.reporting.rows import read_rows
from bench.sampling.trajectory import Trajectory
from bench.training.rounds import path_kl

pytestmark = pytest.mark.usefixtures("undrawn")

OPTIONS = ["--set", "evaluation.samples_per_prompt=64", "--set", "evaluation.metrics=[reward,path_kl]"]


def at_the_optimum(path: str, target: str) -> tuple[Core, ValueMatching, Truth]:
    """A core whose value network is `−log F̃(z_k) = const − b_k·z_k`, the constants left at zero."""
    method = ValueMatching(ValueMatchingConfig(target=target))
    core = gaussian_core(5, path=path, method=method)
    truth = truth_of(core)
    core.networks["value"].slope.data[core.kernel.times.round().long()] = -truth.flow
    return core, method, truth


def round_of(core: Core, method: ValueMatching, rows: int) -> Trajectory:
    with torch.no_grad():
        return with_rewards(core, method.collect(core, core.batch((f"{i}", 0) for i in range(rows)), 0))


@PATHS
def test_the_steered_steps_are_those_of_the_tilted_prior(path):
    """`μ_φ = μ_# + σ_k² b_{k+1}` at every sampled state; the prior's outputs are recorded beside."""
    core, method, truth = at_the_optimum(path, "kl")
    data = round_of(core, method, 6)
    for k in range(data.steps):
        z = data.latents[:, k]
        prior = core.predict(z, k, data.conditioning, prior=True)
        assert torch.equal(data.prior_output[:, k], prior)
        shift = core.kernel.mean(z, data.model_output[:, k], k) - core.kernel.mean(z, prior, k)
        torch.testing.assert_close(shift, (truth.variance[k] * truth.flow[k + 1]).expand_as(shift))
    repeated = method.sample(core, core.batch(data.samples)).latents
    torch.testing.assert_close(repeated, data.latents)


@PATHS
def test_the_watched_divergence_is_that_of_the_steered_path(path):
    """`Σ_k σ_k² |b_{k+1}|² / 2`, by which `train.max_path_kl` ends a run; the adapters' own would be 0."""
    core, method, truth = at_the_optimum(path, "kl")
    expected = float((truth.variance * truth.flow[1:].square().sum(1)).sum()) / 2
    assert path_kl(core, method, core.batch([("a", 0), ("b", 0)])) == pytest.approx(expected)


@PATHS
@pytest.mark.parametrize("target", ["log_ratio", "kl"])
def test_the_cost_at_the_optimum(path, target):
    """Less the value it is constant at every step under log-ratios; else its variance is `Σ_{j≥k} σ_j² |b_{j+1}|²`."""
    core, method, truth = at_the_optimum(path, target)
    rows = 20_000 if target == "kl" else 50
    data = round_of(core, method, rows)
    values = [method.value(core, data.latents[:, k], torch.full((rows,), k), data.conditioning) for k in range(6)]
    variance = (torch.stack(values, 1).detach() - method.costs(core, data)).var(0)
    steps = truth.variance * truth.flow[1:].square().sum(1)
    expected = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1)]) * (target == "kl")
    torch.testing.assert_close(variance[1:], expected[1:], rtol=0.05, atol=1e-10)


def test_the_loss_is_the_weighted_square_over_all_steps():
    core, method, truth = at_the_optimum("diffusion", "kl")
    data = round_of(core, method, 7)
    costs, total = method.costs(core, data), 0.0
    for k in range(1, 6):
        weight = 1 / (1 + truth.variance[k:].sum() / 2)
        error = -(data.latents[:, k] * truth.flow[k]).sum(1) - costs[:, k]
        total += float(weight * (error**2).mean()) / 5
    loss, gradient = gradients(method.losses(core, data), 7, core.networks["value"].parameters())
    assert loss == pytest.approx(total, rel=1e-10)
    assert gradient.any()
    assert costs[:, -1].tolist() == pytest.approx((-BETA * data.rewards).tolist())


def test_a_run_is_evaluated_again_with_its_network(bench, tmp_path, monkeypatch):
    """`bench eval` on the same noise gives the run's rows, as it would not without the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    more = [*OPTIONS, "--set", "optimizer.lr=0.01"]
    status, text = bench("run", "value_matching", "--model", "gaussian", "--updates", 8, "--out", out, *more)
    assert status == 0, text
    status, text = bench("eval", out, "--set", "evaluation.metrics=[path_kl,reward]")
    assert status == 0, text
    (again,) = out.glob("eval-*/rows.parquet")
    first, second = (read_rows(path).set_index("metric")["value"] for path in (out / "rows.parquet", again))
    assert first["path_kl"] > 0.01
    assert second["path_kl"] == pytest.approx(first["path_kl"], rel=1e-6)
    (out / "adapter" / "networks.safetensors").write_bytes(b"damaged")
    status, text = bench("eval", out, "--set", "evaluation.metrics=[path_kl,reward]")
    assert status == 2 and "networks.safetensors is missing, damaged or of another version" in text.replace("\n", " ")
    status, text = bench("sample", out)
    assert status == 2 and "trains no adapter" in text.replace("\n", " ")


def test_an_average_of_adapters_is_refused(bench):
    status, text = bench("run", "value_matching", "--model", "gaussian", "--set", "train.ema=0.9", "--dry-run")
    assert status == 2 and "trains none" in text
