"""`--dry-run` says what each saving brings, and which is the cheapest that fits a GPU."""

from pathlib import Path

import pytest
import torch

from bench.config import resolve
from bench.errors import BenchError
from bench.runs.combinations import GIB, combinations, combinations_text, gpu_bytes
from bench.runs.estimate import SHARE, estimate_memory, model_shapes
from bench.settings import RunConfig

STEPS = ["checkpointing=true", "offload=true", "quantize=int8", "quantize=nf4"]


def config(folder: Path, *assignments: str) -> RunConfig:
    names = {"model.name": str(folder), "prompts.name": "simple_animals"}
    options = ["evaluation.features=efficientnet_lite0", "train.updates_per_round=1", *assignments]
    return resolve("draft_1", reward="colorfulness", overrides=names, assignments=options)


def test_the_estimates_are_those_of_the_settings(pipeline_folder: Path) -> None:
    found = combinations(config(pipeline_folder))
    assert list(found) == ["", *(" ".join(f"model.{one}" for one in step) for step in (
        STEPS[:1], STEPS[:2], STEPS[:3], [*STEPS[:2], STEPS[3]]
    ))]  # fmt: skip
    for text, size in found.items():
        given = config(pipeline_folder, "train.micro_batch=1", "train.sample_batch=1", *text.split())
        assert size == sum(estimate_memory(given, torch.bfloat16).values())
    sizes = list(found.values())
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes[1:])) == 4  # a decoder that is asked for one image keeps no more without recomputing


def test_processes_share_the_denoiser(pipeline_folder: Path) -> None:
    """A quantised one is not shared. Of more processes each keeps less, and gathers as much."""
    found = combinations(config(pipeline_folder), processes=4)
    texts = list(found)
    assert [text.split()[-1].removeprefix("model.") for text in texts[1:]] == [*STEPS[:2], "shard=true", *STEPS[2:]]
    shared = texts[3]
    assert all("shard" not in text for text in texts if text != shared)
    shapes = model_shapes(config(pipeline_folder), torch.bfloat16)
    assert found[texts[2]] - found[shared] == shapes.denoiser - -(-shapes.denoiser // 4) - shapes.gathered
    assert 0 < shapes.gathered < shapes.denoiser / 2
    *_, line = combinations_text(config(pipeline_folder), round(found[shared] / SHARE) + 1, 4)
    assert line.endswith(" --set model.shard=true")
    for own in ("model.compile=true", "model.quantize=int8", "model.finetune=full"):
        assert not any("shard" in text for text in combinations(config(pipeline_folder, own), processes=4))


def test_the_first_that_fits_is_named(pipeline_folder: Path) -> None:
    own = config(pipeline_folder)
    found = combinations(own)
    for size in list(found.values())[::2]:
        first = next(one for one, needed in found.items() if needed <= size)
        *_, line = combinations_text(own, round(size / SHARE) + 1)
        if first:
            assert line.endswith(": " + " ".join(f"--set {one}" for one in first.split()))
        else:
            assert line.startswith("It fits this GPU as it is")
    *_, line = combinations_text(own, min(found.values()))
    assert line.startswith("None of these fits this GPU (")
    assert combinations_text(own, None)[-1].startswith("--gpu-memory 24gb says")


@pytest.mark.parametrize(
    ("assignments", "left"),
    [
        (["model.finetune=full"], STEPS[:2]),
        (["model.lora.use_dora=true", "model.offload=true"], STEPS[:1]),
        (["model.quantize=int8"], STEPS[:2]),
    ],
)
def test_what_is_set_or_does_not_fit_is_not_advised(
    pipeline_folder: Path, assignments: list[str], left: list[str]
) -> None:
    *_, most = combinations(config(pipeline_folder, *assignments))
    assert most.split() == [f"model.{step}" for step in left]


@pytest.mark.parametrize("text", ["24gb", "24GiB", "24", " 24.0 g"])
def test_sizes_are_gibibytes(text: str) -> None:
    assert gpu_bytes(text) == 24 * GIB


@pytest.mark.parametrize("text", ["", "0gb", "large", "24tb", "-1gb"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="give a size in GiB, such as 24gb"):
        gpu_bytes(text)


def test_the_plan_says_it(bench, untried: None, pipeline_folder: Path) -> None:
    words = ("run", "draft_1", "--model", pipeline_folder, "--reward", "colorfulness", "--gpu-memory", "24gb")
    status, text = bench(*words, "--dry-run")
    assert status == 0, text
    assert "  model.checkpointing=true model.offload=true model.quantize=nf4" in text
    assert "It fits this GPU as it is (19.2 of 24.0 GiB may be used)." in text
    status, text = bench(*words)
    assert (status, "--gpu-memory belongs to --dry-run" in text) == (2, True)
