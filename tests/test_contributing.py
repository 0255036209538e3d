"""The examples of CONTRIBUTING.md work as they stand in the page."""

import re
import tomllib
from pathlib import Path

import pytest

from bench import registry
from bench.reporting.rows import read_rows

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf8")
PROJECT = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.S)[1])["project"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's three plugins, as installing its package would leave them."""
    info = tmp_path / "my_plugin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n")
    lines = []
    for code, (group, entries) in zip(
        re.findall(r"```python\n(.*?)```", PAGE, re.S), PROJECT["entry-points"].items(), strict=True
    ):
        ((name, target),) = entries.items()
        (tmp_path / f"{target.split(':')[0]}.py").write_text(code)
        lines += [f"[{group}]", f"{name} = {target}"]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.plugins.cache_clear()
    yield
    registry.plugins.cache_clear()


def test_the_examples_run_as_an_installed_package(installed, tiny_run):
    assert "nabla_gfn" in registry.plugins("methods")
    assert registry.plugins("methods")["rwr"].package == "my-plugin"
    options = ["--reward", "symmetry", "--metric", "saturation", "--set", "evaluation.metrics=[reward,path_kl]"]
    rows = read_rows(tiny_run("rwr", *options) / "rows.parquet")
    assert set(rows["method"]) == {"rwr"}
    assert set(rows["reward"]) == {"symmetry"}
    values = rows.set_index("metric")["value"]
    assert values["path_kl"] > 0  # it trained
    assert -1 < values["reward/train"] < 0 <= values["saturation"] < 1


@pytest.mark.parametrize("name", ["symmetry", "saturation"])
def test_the_examples_pass_their_selftest(name, installed, bench):
    status, text = bench("selftest", name)
    assert status == 0, text
