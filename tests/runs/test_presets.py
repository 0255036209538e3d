"""`--preset`: settings with which a run fits a GPU, by the memory estimate."""

import pytest
import torch

from bench.config import parse_assignment, resolve
from bench.errors import BenchError
from bench.runs.estimate import SHARE, estimate_memory
from bench.runs.presets import GIB, SIZES, fitted, preset_text
from bench.settings import RunConfig

FULL = ("model.lora.rank=64", "evaluation.rewards=[colorfulness]")


def emoji(*assignments: str) -> RunConfig:
    return resolve("nabla_gfn", assignments=list(assignments))


def gib(config: RunConfig) -> float:
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32  # of a model that ships
    return sum(estimate_memory(config, dtype).values()) / GIB


def with_rows(config: RunConfig, rows: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": rows})})


@pytest.mark.parametrize(
    ("size", "savings"),
    [
        (10, []),
        (0.085, ["model.checkpointing"]),
        (0.072, ["model.offload"]),
        (0.055, ["model.offload", "model.dtype"]),
        (0.038, ["model.offload", "model.dtype", "model.lora.rank"]),
    ],
)
def test_what_is_chosen_fits_and_nothing_milder_does(monkeypatch, size, savings) -> None:
    """On a model so small that its shapes are read at once, and GPUs to match; its checks load nothing."""
    monkeypatch.setitem(SIZES, "16gb", size)
    config = emoji(*FULL)
    found = fitted(config, "16gb")
    train = found.config.train
    assert sorted(found.chosen) == sorted([*savings, "train.micro_batch", "train.sample_batch"])
    assert gib(found.config) == pytest.approx(found.bytes / GIB)
    assert gib(found.config) <= SHARE * size
    assert train.micro_batch == 64 or gib(with_rows(found.config, 2 * train.micro_batch)) > SHARE * size
    assert train.sample_batch == min(64, 2 * train.micro_batch)
    assert (found.config.hash() == config.hash()) == ("model.dtype" not in savings)
    if "model.dtype" in savings:  # one less of what changes the run, and nothing fits
        with pytest.raises(BenchError, match="--preset 16gb: even with"):
            fitted(config, "16gb", ["model.dtype", "model.lora.rank"][len(savings) - 2 :])


def test_what_is_set_stays(monkeypatch) -> None:
    monkeypatch.setitem(SIZES, "16gb", 0.2)
    texts = ["train.micro_batch=2", "evaluation.rewards=[colorfulness]", "model.lora.rank=16"]
    found = fitted(emoji(*texts), "16gb", [parse_assignment(text)[0] for text in texts])
    assert found.config.train.micro_batch == 2
    assert found.config.evaluation.rewards == ["colorfulness"]
    assert found.config.model.lora.rank == 16
    assert set(found.chosen) == {"train.sample_batch"}


def test_processes_share_what_fits() -> None:
    assert fitted(emoji(), "80gb", processes=8).config.train.micro_batch == 3  # 48 trajectories, two updates


def test_nothing_is_chosen_for_a_model_of_points() -> None:
    config = resolve("rtb", overrides={"model.name": "ring"})
    found = fitted(config, "16gb")
    assert found.config == config
    assert "nothing is chosen" in preset_text("16gb", found)


@pytest.mark.slow
def test_a_full_size_run_fits_or_is_refused_with_what_takes_least(bench) -> None:
    status, text = bench("run", "ddpo", "--reward", "hps", "--preset", "24gb", "--dry-run")
    assert status == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("preset 24gb: ")]
    assert f"  micro_batch: {line.split('train.micro_batch = ')[1].split(',')[0]}" in text
    assert line.endswith("of 24 GiB on a GPU")
    status, text = bench("run", "nabla_gfn", "--reward", "hps", "--preset", "16gb", "--dry-run")
    assert status == 2
    assert "--preset 16gb: even with evaluation.rewards=[], model.lora.rank=4, train.micro_batch=1 this run" in text
    status, text = bench("run", "ddpo", "--preset", "25gb", "--dry-run")
    assert (status, "unknown preset '25gb'; did you mean '24gb'?" in text) == (2, True)
