"""The architecture's promises, checked on the source: who imports whom, and who owns what."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from bench import registry

ROOT = Path(__file__).parent.parent
OURS = {"bench", "methods", "rewards", "metrics", "results"}


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", ["methods", "rewards", "metrics"])
def test_plugins_import_only_bench_and_their_like(package):
    for path in (ROOT / package).glob("*.py"):
        own = {name for name in imported(path) if name.split(".")[0] in OURS}
        assert {name.split(".")[0] for name in own} <= {"bench", package}, path


def test_bench_reaches_plugins_only_through_the_registry():
    for path in (ROOT / "bench").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"methods", "rewards", "metrics"}, path


def test_results_stand_alone():
    for path in (ROOT / "results").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"bench", "torch", "diffusers"}, path
    code = "import sys, results.rows, results.table, results.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_trainer_knows_no_method_and_methods_own_no_machinery():
    trainer = (ROOT / "bench" / "training" / "trainer.py").read_text(encoding="utf8")
    assert not [name for name in registry.BUILT_IN["methods"] if re.search(rf"\b{name}\b", trainer)]
    for path in (ROOT / "methods").glob("*.py"):
        text = path.read_text(encoding="utf8")
        assert not [word for word in (".backward(", "optim.", ".cuda(", ".device", "randn") if word in text]
        assert not {name.split(".")[0] for name in imported(path)} & {"diffusers", "accelerate", "peft"}
        assert text.count("\n") < 200, path


def test_no_import_circles():
    """Imports inside functions and under TYPE_CHECKING count: whoever reads a module must find an end."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
             for p in (ROOT / "bench").rglob("*.py")}  # fmt: skip
    graph = {}
    for module, path in files.items():
        graph[module] = {name for name in imported(path) if name in files} - {module}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert set(order) == set(files)
    assert "bench.options" in graph["bench.settings"]  # the walk sees imports at all


def test_every_registered_plugin_loads_and_says_what_it_is():
    for kind in registry.BUILT_IN:
        for name in registry.BUILT_IN[kind]:
            assert registry.load(kind, name).__doc__.strip(), name
