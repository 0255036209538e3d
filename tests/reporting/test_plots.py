"""Pictures of one run show its samples and its curves."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from bench.reporting.plots import plot_curves, plot_samples


def test_samples_show_the_prior_above_the_finetuned(tmp_path: Path) -> None:
    prior, finetuned = np.zeros((2, 3, 3, 32, 32, 3), np.uint8)
    prior[..., 0] = finetuned[..., 2] = 255
    prompts = ["a $red$ apple", "long " * 60, "cat"]
    plot_samples(prior, finetuned, prompts, tmp_path / "samples.png", "title", np.ones((3, 3)), np.zeros((3, 3)))
    pixels = matplotlib.image.imread(tmp_path / "samples.png")[..., :3]
    red, blue = ((pixels == color).all(2) for color in ([1, 0, 0], [0, 0, 1]))
    assert red.mean() > 0.15
    assert red.mean() == pytest.approx(blue.mean(), rel=0.02)
    columns = red.any(0) & blue.any(0)
    # below the first red pixel of a column comes its blue one: the finetuned strip lies under the prior's
    assert (red.argmax(0) < blue.argmax(0))[columns].all()
    assert columns.mean() > 0.4


@pytest.mark.parametrize("updates", [1, 40, 300])
def test_curves_are_drawn(tmp_path: Path, updates: int) -> None:
    generator = np.random.default_rng(0)
    names = ("reward_over_prior", "loss", "gradient_norm/policy", "seconds/sample")
    log = pd.DataFrame({name: generator.normal(1, 0.1, updates) for name in names})
    log["update"], log["round"] = np.arange(1, updates + 1), np.arange(updates) // 2
    marks = pd.DataFrame({"updates": [1, updates], "prior": 2.0, "difference": 1.0, "standard_error": 0.2})
    plot_curves(log, tmp_path / "four.png", "title", marks)
    plot_curves(log.drop(columns=["loss", names[2]]).rename(columns={names[0]: "reward"}), tmp_path / "two.png")
    four, two = (matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("four", "two"))
    assert four.shape[1] == two.shape[1]
    assert four.shape[0] > 1.8 * two.shape[0]
    half, middle = four.shape[0] // 2, four.shape[1] // 2
    for panel in (four[:half, :middle], four[:half, middle:], four[half:, :middle], four[half:, middle:]):
        assert (panel.std(2) > 0.02).mean() > 1e-4  # points, bars or lines, even of one update
