"""The memory estimate follows from what the files and the settings say, and is computed once for each."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from bench.config import resolve
from bench.runs import estimate
from bench.runs.estimate import Shapes, model_shapes


def test_shapes_are_computed_once_and_anew_where_they_change(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = estimate.build
    monkeypatch.setattr(estimate, "_known", {})
    monkeypatch.setattr(estimate, "build", lambda kind, config: built.append(kind) or build(kind, config))
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")

    def shapes(*assignments: str, dtype: torch.dtype = torch.float32) -> Shapes | None:
        settings = [f"model.name={folder}", "evaluation.features=efficientnet_lite0", *assignments]
        return model_shapes(resolve("ddpo", reward="colorfulness", assignments=settings), dtype)

    def wide() -> None:
        file = folder / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_per_block": 2}))

    first = shapes()
    count = len(built)
    assert count and first
    assert first == shapes("model.checkpointing=true", "model.offload=true", "train.micro_batch=3") == shapes()
    assert len(built) == count
    others = [shapes("model.finetune=full"), shapes("model.lora.rank=32"), shapes(dtype=torch.bfloat16)]
    wide()
    others.append(shapes())
    assert len(built) == 5 * count
    assert all(one != other for one, other in itertools.combinations([first, *others], 2))
