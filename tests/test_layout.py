"""The architecture's promises, checked on the source: who imports whom, and who owns what."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from scaffold import LONG

from bench import registry

ROOT = Path(__file__).parent.parent


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:  # relative: of the plugins' own folder
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", ["methods", "rewards", "metrics"])
def test_plugins_import_only_bench_and_their_like(folder):
    for path in (ROOT / folder).rglob("*.py"):
        others = {"methods", "rewards", "metrics", "results", "tests"} | {
            f"bench.{other}" for other in ("methods", "rewards", "metrics") if other != folder
        }
        assert not {name for name in imported(path) if name.startswith(tuple(others))}, path


def test_bench_reaches_plugins_only_through_the_registry():
    for path in (ROOT / "bench").rglob("*.py"):
        names = {name.removeprefix("bench.").split(".")[0] for name in imported(path)}
        assert not names & {"methods", "rewards", "metrics"}, path


def test_reporting_imports_no_torch():
    for path in (ROOT / "bench" / "reporting").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "diffusers"}, path


def test_runtime_is_the_ground_floor():
    for path in (ROOT / "bench" / "runtime").glob("*.py"):
        ours = {name for name in imported(path) if name.startswith("bench.")}
        assert all(name.startswith(("bench.errors", "bench.runtime")) for name in ours), path


def test_the_trainer_knows_no_method_and_methods_own_no_machinery():
    trainer = (ROOT / "bench" / "training" / "trainer.py").read_text(encoding="utf8")
    assert not [name for name in registry.BUILT_IN["methods"] if re.search(rf"\b{name}\b", trainer)]
    for path in (ROOT / "methods").rglob("*.py"):
        text = path.read_text(encoding="utf8")
        assert not [word for word in (".backward(", "optim.", ".cuda(", ".device", "randn") if word in text]
        assert not {name.split(".")[0] for name in imported(path)} & {"diffusers", "accelerate", "peft"}
        assert text.count("\n") < 200, path


def modules() -> dict[str, Path]:
    """Dotted name → file, of everything in `bench`."""
    files = sorted((ROOT / "bench").rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def test_no_import_circles():
    """Imports inside functions and under TYPE_CHECKING count: whoever reads a module must find an end."""
    files = modules()
    graph = {module: {name for name in imported(path) if name in files} - {module} for module, path in files.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert set(order) == set(files)
    assert "bench.options" in graph["bench.settings"]  # the walk sees imports at all


def test_no_circles_of_folders():
    """A folder counts as one; the modules that lie beside the folders count each for itself."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    files, graph = modules(), {}
    for module, path in files.items():
        others = {room(name) for name in imported(path) if name in files and name != "bench"}
        graph.setdefault(room(module), set()).update(others - {room(module)})
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph) > 20


def test_every_registered_plugin_loads_and_says_what_it_is():
    for kind in registry.BUILT_IN:
        for name in registry.BUILT_IN[kind]:
            assert registry.load(kind, name).__doc__.strip(), name


def test_text_is_read_and_written_in_a_named_encoding():
    """Else it is the locale's, which may be ASCII."""
    for path in (ROOT / "bench").rglob("*.py"):
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(node, ast.Call)
        ):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = {option.arg: ast.unparse(option.value) for option in call.keywords}
            modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            text = bool(name == "open" and modes and "b" not in modes[-1])
            text |= name in ("read_text", "write_text") and len(call.args) < {"read_text": 1, "write_text": 2}[name]
            text |= given.get("text") == "True"
            assert not text or "encoding" in given, f"{path}:{call.lineno}"


def test_files_of_tests_have_names_of_their_own():
    """As modules of one interpreter, and where an order names them."""
    names = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
    assert set(names) >= LONG
