"""Sizes of one: a right value, no spread where one sample has none, or one sentence; and no warning from NumPy."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.config import resolve
from bench.errors import BenchError
from bench.reporting.plots import plot_samples
from bench.reporting.rows import read_rows
from bench.runs.preflight import check

Bench = Callable[..., tuple[int, str]]
ONES = ("train.prompts_per_round=1", "train.samples_per_prompt=1", "train.updates_per_round=1", "train.micro_batch=1",
        "train.sample_batch=1", "sampler.steps=1", "evaluation.samples_per_prompt=2")  # fmt: skip
SETS = [word for one in ONES for word in ("--set", one)]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("rtb", ""),
        ("draft_full", ""),
        ("ddpo", ""),
        ("grpo", "train.samples_per_prompt"),
        ("nft", "train.samples_per_prompt"),
        ("awm", "train.samples_per_prompt"),
        ("rvm", "train.samples_per_prompt"),
        ("tilt_matching", "train.samples_per_prompt"),
        ("iterative_tilting", "train.samples_per_prompt"),
        ("dgpo", "train.samples_per_prompt"),
        ("crd", "train.samples_per_prompt"),
        ("flash_grpo", "train.samples_per_prompt"),
        ("gardo", "sampler.steps"),
        ("flow_grpo", "sampler.steps"),
        ("mix_grpo", "sampler.steps"),
        ("value_matching", ""),
        ("online_dpo", "train.samples_per_prompt"),
        ("rtb_softmax", "train.samples_per_prompt"),
        ("tmpo", "train.samples_per_prompt"),
        ("leap_align", "sampler.steps"),
        ("alignprop", "method.start"),
    ],
)
def test_a_run_of_ones(method: str, why: str, bench: Bench, tmp_path: Path) -> None:
    """On a model of points: one update of one trajectory of one step. What could learn nothing is refused."""
    out = tmp_path / "runs" / "one"
    status, text = bench("run", method, "--model", "ring", "--updates", 1, *SETS, "--out", out)
    if why:
        assert status == 2
        assert "could do nothing" in text and why in text
        assert not out.exists()
        return
    assert status == 0, text
    assert {"curves.png", "samples.png", "rows.parquet"} <= {path.name for path in out.iterdir()}
    drawn = ("--metrics", "reward/train,path_kl", "--out", tmp_path / "report") if method == "rtb" else ()
    for question in (drawn, ("--at-updates", 1), ("--at-reward-gain", 1e-9), ("--all",)):
        status, text = bench("report", tmp_path / "runs", *question)
        assert status == 0, text


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        ("awm", ["train.ema=0.9"], "keeps an 'ema' of its own"),
        ("nft", ["train.data_lag=1"], "the copy has moved"),
        ("crd", ["train.data_lag=1"], "the copy has moved"),
        ("tilt_matching", ["train.data_lag=1"], "the copy has moved"),
        (
            "value_matching",
            ["evaluation.sampler.eta=0"],
            "'value_matching' needs transition densities: use evaluation.sampler.eta > 0",
        ),
        ("gardo", ["method.gated_range=[3, 4]"], "gated_range"),
        ("ddpo", ["method.buffer=8"], "minimum = 16 entries never fit into buffer = 8"),
        ("fk_steering", ["method.resample_at=[7]"], "resample_at"),
    ],
)
def test_settings_that_contradict_a_method_are_refused(method: str, settings: list[str], why: str) -> None:
    with pytest.raises(BenchError, match=re.escape(why)):
        check(resolve(method, suite="ring", assignments=settings))


def test_a_softmax_needs_two_samples_of_a_prompt_in_an_update() -> None:
    settings = ["train.samples_per_prompt=4", "train.updates_per_round=4"]
    with pytest.raises(BenchError, match=r"rtb_softmax.*train\.updates_per_round"):
        check(resolve("rtb_softmax", suite="ring", assignments=settings))
    check(resolve("rtb_softmax", suite="ring", assignments=[settings[0], "train.updates_per_round=3"]))


def test_one_sample_of_one_prompt_is_drawn_and_one_run_reported(tiny_run, bench: Bench, tmp_path: Path) -> None:
    """Images: one prompt, none held out; then one image of it, the page and the figures of one run and evaluation."""
    prompts = tmp_path / "one.txt"
    prompts.write_text("cat\n", encoding="utf8")
    run = tiny_run("draft_full", *SETS, "--prompts", prompts, updates=1)
    rows = read_rows(run / "rows.parquet").set_index("metric")
    assert rows.loc["reward/train", "n"] == 2 and "reward/test" not in rows.index
    status, text = bench("sample", run, "--n", 1, "--out", tmp_path / "drawn")
    assert status == 0, text
    index = pd.read_csv(tmp_path / "drawn" / "index.csv")
    assert index["sample"].tolist() == [0]
    assert (tmp_path / "drawn" / "samples.png").stat().st_size > 0
    status, text = bench(
        "report", run, "--metrics", "reward/train,diversity/efficientnet_lite0", "--format", "html", "--out", tmp_path
    )
    assert status == 0, text
    status, text = bench("eval", run, "--set", "evaluation.samples_per_prompt=1")
    assert status == 2 and "evaluation.samples_per_prompt = 1" in text


def test_one_sample_has_a_mean_and_no_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    for count in (1, 2):
        images = np.zeros((2, 1, 8, 8, 3), np.uint8)
        before, after = np.full((2, count), 0.25), np.full((2, count), 0.5)
        plot_samples(images, images, ["a", "b"], tmp_path / "x.png", "", before, after)
        label = drawn[-1].axes[0].get_yticklabels()[0].get_text()
        assert label.splitlines()[0] == "prior"
        assert float(label.split()[1]) == pytest.approx(0.25, abs=0.06)
        assert ("±" in label) == (count > 1)


@pytest.mark.parametrize("command", ["report", "sample", "profile", "serve", "run", "sweep"])
def test_counts_below_one_are_refused(command: str, bench: Bench, tmp_path: Path) -> None:
    options = {
        "report": ["--at-updates", 0],
        "sample": ["RUN", "--n", 0],
        "profile": ["--repeats", 0],
        "serve": ["--port", -1],
        "run": ["draft", "--updates", 0],
        "sweep": ["x.yaml", "--workers", 0],
    }
    status, text = bench(command, *options[command])
    assert status == 2
    assert "Traceback" not in text
    assert "greater" in text
