"""What a trained adapter carries: kept images, a card whose lines redraw one of them, sampling and pushing."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.sampling.noise import generator, key


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.slow
def test_the_cards_lines_as_they_stand_redraw_an_image_of_the_run(tiny_run, bench, tmp_path):
    folder = tiny_run("draft_1", "--set", "optimizer.lr=0.05", "--set", "evaluation.metrics=[reward]")
    shutil.copytree(folder / "adapter", tmp_path / "moved")  # it stands alone
    card = (tmp_path / "moved" / "README.md").read_text()
    for words in (
        "draft_1",
        "colorfulness",
        "3 steps of `ddim`",
        "reward/train",
        "not known here",
        "library_name: diff",
    ):
        assert words in card
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path / "moved", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = list(csv.DictReader((folder / "images" / "index.csv").open()))
    assert len(index) == 6  # 3 prompts, 2 samples
    drawn, kept, prior = (
        pixels(path)
        for path in (
            tmp_path / "moved" / "redrawn.png",
            folder / "images" / index[0]["finetuned"],
            folder / "images" / index[0]["prior"],
        )
    )
    assert np.abs(drawn - kept).max() <= 1  # the run merges the adapter, which rounds otherwise
    assert np.abs(kept - prior).max() > 5

    # the same, and other prompts, from the command; what the evaluation drew is drawn again
    status, text = bench("sample", tmp_path / "moved", "--prompt", index[0]["prompt"], "--prompt", "zebra", "--n", 2)
    assert status == 0, text
    again = list(csv.DictReader((tmp_path / "moved" / "drawn" / "index.csv").open()))
    assert [line["prompt"] for line in again] == [index[0]["prompt"]] * 2 + ["zebra"] * 2
    assert np.abs(pixels(tmp_path / "moved" / "drawn" / again[0]["finetuned"]) - kept).max() <= 1
    assert np.abs(pixels(tmp_path / "moved" / "drawn" / again[0]["prior"]) - prior).max() <= 1
    assert float(again[0]["colorfulness/finetuned"]) == pytest.approx(
        float(index[0]["colorfulness/finetuned"]), abs=0.5
    )
    assert (tmp_path / "moved" / "drawn" / "samples.png").stat().st_size > 0

    status, text = bench("push", folder, "me/adapter")
    assert status == 2
    assert "the hub cannot be reached" in text
    assert "is no hub id" in bench("push", folder, "adapter")[1]


def test_every_exported_layout_draws_the_runs_image(tiny_run, bench, tmp_path, monkeypatch):
    """The card's lines as they stand, each layout read by diffusers' or peft's own call."""
    ema = ["--set", "train.ema=0.1", "--set", "evaluation.weights=ema"]  # not the policy's weights
    folder = tiny_run("draft_1", "--set", "optimizer.lr=0.05", "--set", "evaluation.metrics=[reward]", *ema)
    status, text = bench("export", folder, "--out", tmp_path / "out")
    assert status == 0, text
    monkeypatch.chdir(tmp_path / "out")
    card = Path("README.md").read_text()
    assert "reward/train" in card and "draft_1" in card
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    own = next(line for line in lines.splitlines() if ".load_lora_weights(" in line)
    others = dict(re.findall(r"^\| `(\w+)/` \| `(.*)` \|$", card, re.MULTILINE))
    assert list(others) == ["peft", "kohya", "merged"]
    index = next(csv.DictReader((folder / "images" / "index.csv").open()))
    kept, prior = (pixels(folder / "images" / index[name]) for name in ("finetuned", "prior"))
    assert np.abs(kept - prior).max() > 5
    for line in (own, *others.values()):
        exec(lines.replace(own, line), {})
        assert np.abs(pixels(Path("redrawn.png")) - kept).max() <= 1, line
        Path("redrawn.png").unlink()
    assert "holds files" in bench("export", folder, "--out", tmp_path / "out")[1]
    assert "the hub cannot be reached" in bench("push", tmp_path / "out", "me/adapter")[1]  # itself an adapter


def test_without_an_adapter_one_sentence(bench, tmp_path, tiny_run):
    for command in ("sample", "export"):
        assert "has no config.yaml" in bench(command, tmp_path)[1]
    assert "trains nothing" in bench("sample", tiny_run("prior", "--set", "evaluation.metrics=[reward]"))[1]


def test_the_key_makes_the_noise_of_numpy_alone():
    found = np.random.Generator(np.random.Philox(key=key(3, "evaluate", "cat", 1), counter=[0, 0, 0, 5]))
    named = generator(3, "evaluate", "cat", 1, step=5)
    assert torch.equal(torch.from_numpy(found.standard_normal(7)), torch.from_numpy(named.standard_normal(7)))
