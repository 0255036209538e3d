"""Analytic models: exact scores, runs from the command line, and distances to their known targets."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from bench.metrics.tilt_sw2 import TiltSw2
from bench.metrics.tilt_tv import TiltTv

from bench.metric import Evaluation, Samples
from bench.models.analytic import GaussianModel, RingModel
from bench.options import Config
from bench.reporting.rows import read_rows
from bench.sampling.grids import ddim_kernel
from bench.sampling.noise import generator


@pytest.mark.parametrize("model_class", [RingModel, GaussianModel])
def test_the_prediction_is_the_score_of_the_noised_data(model_class):
    """`ε_# = −√(1−ᾱ) ∇ log p_t`, the mixture's density differentiated by autograd."""
    model = model_class(dtype=torch.float64)
    z = torch.from_numpy(generator(0, "train", "analytic").standard_normal((64, 2))).requires_grad_()
    for t in (0, 31, 400, 981):
        alpha = model.spec.alphas_cumprod[t]
        variance = alpha * model.std**2 + 1 - alpha
        squares = (z[:, None] - alpha.sqrt() * model.means).square().sum(2)
        (score,) = torch.autograd.grad(torch.logsumexp(-squares / (2 * variance), 1).sum(), z)
        eps = model.predict(z, torch.tensor(t), model.encode([""] * 64), prior=True)
        assert torch.allclose(eps, -((1 - alpha) ** 0.5) * score, rtol=1e-9, atol=1e-12)
        assert torch.equal(eps, model.predict(z, torch.tensor(t), model.encode([""] * 64)))  # untrained: the prior


def test_the_ring_is_where_it_should_be():
    model = RingModel()
    kernel = ddim_kernel(model.spec.alphas_cumprod, 20, steps_offset=model.spec.steps_offset)
    assert kernel.timesteps.tolist() == list(range(981, 30, -50))
    assert torch.allclose(model.means.norm(dim=1), torch.tensor(3.0))
    axis = torch.linspace(-6, 6, 400)
    grid = torch.stack([axis.repeat(400), axis.repeat_interleave(400)], 1)
    assert float(model.log_density(grid).exp().sum() * (12 / 399) ** 2) == pytest.approx(1, abs=1e-4)


def evaluation(finetuned: torch.Tensor, size: int = 4000) -> Evaluation:
    """Prior: the left mode three times as likely as the right one; the tilt makes them equal."""

    def prior(seed: int) -> Samples:
        rng = generator(seed, "evaluate", "tilt")
        side = torch.from_numpy((rng.random(size) < 0.25).astype(np.float32)) * 2 - 1
        points = torch.stack([side, torch.zeros(size)], 1)
        return Samples(points, [""] * size, ["train"] * size, {"r": (side > 0).float()})

    own = replace(prior(0), images=finetuned)
    sets = {"finetuned": own, "prior": prior(1), "reference": prior(2), "floor": prior(3)}
    modes = torch.tensor([[-1.0, 0], [1, 0], [0, 50]])
    beta = float(np.log(3))
    return Evaluation(
        **sets, reward="r", beta=beta, features=lambda s, space=None: s.images, feature_space="points", modes=modes
    )


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
def test_distances_to_a_target_that_can_be_counted(share):
    n = 4000
    right = torch.arange(n) < share * n
    points = torch.stack([torch.where(right, 1.0, -1.0), torch.zeros(n)], 1)
    tv, tv_floor = TiltTv(Config())(evaluation(points))
    assert tv.value == pytest.approx(abs(share - 0.5), abs=0.02)
    assert tv.prior == pytest.approx(0.25, abs=0.02)
    assert tv_floor.value < 0.03
    # W₂² along a direction at angle a is 4 cos² a times the share that must move; the mean of cos² is one half
    sw2, sw2_floor = TiltSw2(Config())(evaluation(points))
    assert sw2.value == pytest.approx((2 * abs(share - 0.5)) ** 0.5, abs=0.2 if share == 0.5 else 0.08)
    assert sw2_floor.value < 0.25
    assert sw2.prior == pytest.approx(0.5**0.5, abs=0.08)


def test_images_have_no_such_rows():
    points = evaluation(torch.zeros(4000, 2))
    assert TiltTv(Config())(replace(points, modes=None)) == []
    images = replace(points.finetuned, images=torch.zeros(4000, 3, 2, 2, dtype=torch.uint8))
    assert TiltSw2(Config())(replace(points, finetuned=images)) == []


@pytest.mark.parametrize("model", ["ring", "gaussian"])
def test_a_run_on_an_analytic_model(model, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, size = tmp_path / "run", 400
    words = ["--set", f"evaluation.samples_per_prompt={size}", "--set", "train.checkpoint_every=2"]
    words += ["--set", "evaluation.metrics=[reward,tilt_tv,tilt_sw2,path_kl,path_kl_steps,tilt_gap]"]
    status, text = bench("run", "--model", model, "--method", "nabla_gfn_adjoint", "--updates", 4, "--out", out, *words)
    assert status == 0, text
    rows = read_rows(out / "rows.parquet").set_index("metric")
    expected = {"reward/train", "tilt_sw2", "tilt_sw2/floor", "path_kl", "tilt_gap"}
    assert set(rows.index) >= expected | ({"tilt_tv", "tilt_tv/floor"} if model == "ring" else set())
    assert rows.loc["tilt_sw2/floor", "value"] < rows.loc["tilt_sw2", "value"] < 1.1 * rows.loc["tilt_sw2", "prior"]
    assert rows.loc["path_kl", "value"] > 0
    steps = rows[rows.index.str.startswith("path_kl_steps/")]
    assert len(steps) == 20 and steps["value"].sum() == pytest.approx(rows.loc["path_kl", "value"], rel=1e-5)
    assert steps["value"][-2:].sum() == pytest.approx(rows.loc["path_kl/late", "value"], rel=1e-5)
    data = np.load(out / "points.npz")
    assert data["finetuned"].shape == data["prior"].shape == data["target"].shape == (size, 2)
    assert data["density"].sum() == pytest.approx(1, abs=1e-3)
    assert plt.imread(out / "samples.png").std() > 0.02
    status, text = bench("eval", out, "--set", "evaluation.samples_per_prompt=200")
    assert status == 0, text


def test_a_reward_of_images_is_refused_on_points(bench):
    status, text = bench("run", "--model", "ring", "--method", "draft", "--reward", "colorfulness")
    assert status == 2
    assert "'colorfulness' scores images" in text
    assert "linear, quadratic" in text
    status, text = bench("run", "--method", "draft", "--reward", "quadratic", "--model", "emoji", "--suite", "emoji")
    assert status == 2
    assert "'quadratic' scores points" in text


def test_best_of_n_is_a_row(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status, text = bench(
        "run", "--model", "ring", "--method", "best_of_n", "--out", tmp_path / "run",
        "--set", "evaluation.samples_per_prompt=500",
    )  # fmt: skip
    assert status == 0, text
    rows = read_rows(tmp_path / "run").set_index("metric")
    assert rows.loc["reward/train", "difference"] > 2
    assert rows.loc["path_kl", "status"] == "refused"
    assert set(rows["updates"]) == {0}
