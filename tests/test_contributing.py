"""The example method of CONTRIBUTING.md works as it stands in the page."""

import re
import tomllib
from pathlib import Path

from bench import registry

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf8")


def test_the_example_method_runs_as_an_installed_plugin(tmp_path, monkeypatch, capsys, tiny_run):
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    project = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.S)[1])["project"]
    (tmp_path / "rwr_plugin.py").write_text(code)
    info = tmp_path / "rwr_plugin-0.1.dist-info"  # what installing the page's package would leave
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = project["entry-points"]["bench.methods"]
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("[bench.methods]\n" + "\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.plugins.cache_clear()
    try:
        folder = tiny_run("rwr")
        assert "nabla_gfn" in registry.plugins("methods")
        assert registry.plugins("methods")["rwr"].package == "rwr-plugin"
    finally:
        registry.plugins.cache_clear()
    from results.rows import read_rows

    rows = read_rows(folder / "rows.parquet")
    assert set(rows["method"]) == {"rwr"}
    assert rows.set_index("metric").loc["path_kl", "value"] > 0  # it trained
