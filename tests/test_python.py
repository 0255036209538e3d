"""Runs from Python: the page's example as it stands, and what its frames hold."""

import re
from pathlib import Path

import pandas as pd
import pytest

from bench import evaluate, load, report, run
from bench.errors import BenchError

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_the_pages_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)
    printed = capsys.readouterr().out
    assert "adjoint_matching" in printed  # the table, and nothing else: no bars
    assert "evaluating" not in printed
    assert names["gain"]["difference"] == pytest.approx(names["gain"]["value"] - names["gain"]["prior"])
    assert list(names["losses"].index) == list(range(1, 21))
    assert names["more"].set_index("metric").loc["reward/train", "n"] == 512
    table: pd.DataFrame = names["table"]
    assert set(table["row"]) == {"rtb", "adjoint_matching"}
    own = table.set_index(["row", "metric"]).loc[("rtb", "reward/train")]
    assert own["value"] == names["gain"]["value"]
    assert own["difference_low"] < own["difference"] == names["gain"]["difference"] < own["difference_high"]
    before = (tmp_path / "runs/rtb/rows.parquet").stat().st_mtime_ns  # finished, so read and not computed
    again = run("rtb", model="ring", updates=20, settings={"evaluation.samples_per_prompt": 256}, out="runs/rtb")
    assert again.rows.equals(names["finished"].rows)
    assert (tmp_path / "runs/rtb/rows.parquet").stat().st_mtime_ns == before


def test_mistakes_are_bench_errors(tmp_path):
    with pytest.raises(BenchError, match="did you mean 'nabla_gfn'"):
        run("nabla_gnf")
    with pytest.raises(BenchError, match="holds no finished run"):
        load(tmp_path)
    with pytest.raises(BenchError, match="no result rows found"):
        report(tmp_path)
    with pytest.raises(BenchError, match="holds no run"):
        evaluate(tmp_path)
