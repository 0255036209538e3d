"""`bench judge --images`: finished images beside the prior's, without a model."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.evaluation.features import find_space
from bench.evaluation.scores import load_reward
from bench.evaluation.statistics import frechet_distance
from bench.prompts import SPLITS, load_prompts
from bench.reporting.rows import read_rows

PROMPTS = ["cat", "dog", "red bird", "fish", "bear"]


def pictures(folder: Path, each: int, seed: int, tint: int = 0, size: int = 32) -> dict[str, list[np.ndarray]]:
    """Smooth random pictures in a folder with an index; prompt → images."""
    folder.mkdir()
    random, drawn, lines = np.random.default_rng(seed), {}, []
    for place, prompt in enumerate(PROMPTS):
        for number in range(each):
            coarse = Image.fromarray(random.integers(0, 256 - tint, (4, 4, 3), dtype=np.uint8) + np.uint8(tint))
            image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
            Image.fromarray(image).save(folder / f"{place}-{number}.png")
            drawn.setdefault(prompt, []).append(image)
            lines.append({"prompt": prompt, "sample": number, "file": f"{place}-{number}.png"})
    with (folder / "index.csv").open("w") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return drawn


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path


METRICS = "evaluation.metrics=[reward,diversity,vendi,fid_prior,kid_prior,coverage,path_kl,output_norm,tilt_gap]"
WORDS = ("judge", "--images", "drawn", "--prior", "before", "--prompts", "prompts.txt", "--reward", "colorfulness",
         "--set", METRICS, "--set", "evaluation.rewards=[]", "--out", "judged")  # fmt: skip


def stack(drawn: dict[str, list[np.ndarray]], prompts: list[str], numbers: range) -> torch.Tensor:
    images = [drawn[prompt][number] for prompt in prompts for number in numbers]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_metrics_without_a_model_are_those_of_the_images(bench, place):
    drawn, before = pictures(place / "drawn", 2, seed=0, tint=60), pictures(place / "before", 6, seed=1)
    status, text = bench(*WORDS, "--label", "closed")
    assert status == 0, text
    rows = read_rows(place / "judged" / "rows.parquet").set_index("metric")
    assert set(rows["method"]) == {"closed (judged; training cost unknown)"}
    known = load_prompts(str(place / "prompts.txt"))
    reward = load_reward("colorfulness")
    for split, prompts in ((split, getattr(known, split)) for split in SPLITS if getattr(known, split)):
        for column, images in (("value", drawn), ("prior", before)):
            score = float(reward(stack(images, prompts, range(2)), []).mean())
            assert rows.loc[f"reward/{split}", column] == pytest.approx(score, rel=1e-4)
    space = find_space("efficientnet_lite0")("cpu")
    sets = {"finetuned": stack(drawn, PROMPTS, range(2)), "reference": stack(before, PROMPTS, range(2, 4))}
    distance = frechet_distance(*(space(images) for images in sets.values()))
    assert rows.loc["fid_prior/efficientnet_lite0", "value"] == pytest.approx(distance, rel=1e-3)
    for name in ("path_kl", "output_norm", "tilt_gap"):
        assert np.isnan(rows.loc[name, "value"])
        assert rows.loc[name, "note"] == "needs the model, and images alone are judged"
    assert (place / "judged" / "samples.png").stat().st_size > 0
    assert "nothing was computed" in bench(*WORDS, "--label", "closed")[1]
    status, text = bench("verify", place / "judged")
    assert (status, "nothing to draw with" in text) == (2, True), text


def test_prompts_are_split_as_the_setting_says(bench, place):
    drawn, _ = pictures(place / "drawn", 2, seed=0), pictures(place / "before", 6, seed=1)
    status, text = bench(*WORDS, "--set", "prompts.split=every_fifth", "--set", "evaluation.metrics=[reward]")
    assert status == 0, text
    rows = read_rows(place / "judged" / "rows.parquet").set_index("metric")
    known, reward = load_prompts(str(place / "prompts.txt"), rule="every_fifth"), load_reward("colorfulness")
    assert known.validation and not known.test
    for split, prompts in {"train": known.train, "validation": known.validation}.items():
        score = float(reward(stack(drawn, prompts, range(2)), []).mean())
        assert rows.loc[f"reward/{split}", "value"] == pytest.approx(score, rel=1e-4)
    assert "reward/test" not in rows.index


def test_too_few_images_of_the_prior_for_distances(bench, place):
    """Pairs are compared; distances to the prior say what they need."""
    pictures(place / "drawn", 3, seed=0)
    pictures(place / "before", 4, seed=1)
    status, text = bench(*WORDS, "--pattern", "{number}-{sample}.png")
    assert status == 0, text
    rows = read_rows(place / "judged" / "rows.parquet").set_index("metric")
    assert rows.loc["diversity/efficientnet_lite0", "n"] == 15
    assert "three times as many images of the prior" in rows.loc["fid_prior", "note"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--pattern", "{sample}.png"), "it holds {sample}, and {number} or {prompt}"),
        (("--pattern", "{number}_{sample}.jpg"), "no file below drawn is called like"),
        (("--pattern", "{sample}-{number}.png"), "none of that number"),
        (("--model", "emoji"), "leave out --model"),
        (("--prior", "nowhere"), "is no folder of images"),
        (("--prompts", "few.txt"), "which is no prompt of few.txt"),
        (("--prompts", "more.txt"), "there is no image of 'zebra'"),
        (("--prior", "large"), "16 x 16"),
        (("--prior", "torn"), "cannot be read as an image"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(bench, place, words, told):
    pictures(place / "drawn", 9, seed=0)
    for name in ("before", "large", "torn"):
        pictures(place / name, 9, seed=1)
    Image.new("RGB", (16, 16)).save(place / "large" / "1-0.png")
    (place / "torn" / "2-1.png").write_bytes(b"no image")
    Path("few.txt").write_text("cat\ndog\n")
    Path("more.txt").write_text("\n".join([*PROMPTS, "zebra"]))
    status, text = bench(*WORDS, *words)
    assert (status, told in " ".join(text.split())) == (2, True), text
    assert not (place / "judged" / "rows.parquet").exists()
