"""The notebook runs as it stands, without a network."""

import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from scaffold import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "first-comparison.ipynb").read_text(encoding="utf8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_to_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plt.close("all")
    names: dict = {}
    for number, cell in enumerate(CODE, 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
    table = names["table"]
    assert list(table.index) == ["draft_1", "rtb"]
    assert table[["reward/train", "path_kl", "tilt_sw2"]].notna().all(axis=None)
    assert len(plt.gcf().axes[0].images) == 1
    assert {len(line.get_xdata()) for line in plt.figure(1).axes[0].lines} == {12}
    assert isinstance(names["images"].rows, pd.DataFrame)
    plt.close("all")


def test_the_notebook_is_stored_without_outputs() -> None:
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
