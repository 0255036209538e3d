"""One import package: installed either way, it neither finds a user's folders of its own names nor hides them."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from scaffold import ROOT

THEIRS = ("methods", "metrics", "rewards", "results", "tests")
SCRIPT = """
import importlib, multiprocessing
import {imports}
from bench import Method, registry

def load():
    for kind in registry.BUILT_IN:
        for name in registry.BUILT_IN[kind]:
            assert registry.load(kind, name).__module__.startswith("bench.")
    return registry.load("methods", "prior").__module__

if __name__ == "__main__":
    for module in "{imports}".split(", "):
        assert importlib.import_module(module).WHOSE == "theirs", module
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(load))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["editable", pytest.param("wheel", marks=pytest.mark.slow)])
def call(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a command from a folder, where the package is this checkout or an installed wheel; returns its output."""
    scripts, path = Path(sys.executable).parent, str(ROOT)
    if request.param == "wheel":
        target = tmp_path_factory.mktemp("site")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
        subprocess.run([*pip, str(request.getfixturevalue("wheel"))], check=True)
        scripts, path = target / "bin", str(target)

    def run(folder: Path, program: str, *arguments: str) -> str:
        command = [sys.executable] if program == "python" else [str(scripts / program)]
        environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "150"}
        done = subprocess.run(
            [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(params=["packages", pytest.param("folders without __init__", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A user's own folder with folders of generic names, and what a script there imports of them."""
    for name in THEIRS:
        (tmp_path / name).mkdir()
        file = "__init__.py" if request.param == "packages" else "own.py"
        (tmp_path / name / file).write_text("WHOSE = 'theirs'\n")
    suffix = "" if request.param == "packages" else ".own"
    return tmp_path, ", ".join(name + suffix for name in THEIRS)


def test_a_users_folders_change_nothing(call, folder) -> None:
    path, imports = folder
    (path / "script.py").write_text(SCRIPT.format(imports=imports))
    assert call(path, "python", "script.py").strip() == "bench.methods.prior"
    assert "nabla_gfn" in call(path, "python", "-m", "bench", "ls", "methods")
    for program in ("bench", "nabla-bench"):
        assert call(path, program, "--version").startswith("nabla-bench ")


@pytest.mark.parametrize("call", ["wheel"], indirect=True)
def test_a_run_starts_in_an_empty_folder(call, tmp_path) -> None:
    tiny = [
        "train.prompts_per_round=2", "train.samples_per_prompt=2", "sampler.steps=2", "evaluation.samples_per_prompt=2",
        "evaluation.train_prompts=1", "evaluation.test_prompts=1", "method.channels=[8,8]",
        "evaluation.metrics=[reward]", "evaluation.rewards=[]", "evaluation.at=[]",
    ]  # fmt: skip
    sets = [word for setting in tiny for word in ("--set", setting)]
    call(tmp_path, "bench", "run", "nabla_gfn", "--updates", "1", "--out", "run", *sets)
    assert (tmp_path / "run" / "rows.parquet").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["wheel"], indirect=True)
def test_sweeps_and_published_tables_are_names_in_an_empty_folder(call, bench, tmp_path) -> None:
    code = "from pathlib import Path; from bench.sweeps.spec import read_sweep; print(read_sweep(Path('ring')).out)"
    assert call(tmp_path, "python", "-c", code) == "runs/ring\n"
    here = ROOT / "results" / "published" / "emoji_small_rate"
    table = call(tmp_path, "bench", "report", "emoji_small_rate", "--format", "csv")
    assert (0, table) == bench("report", here, "--format", "csv")


def test_the_wheel_holds_one_package_and_of_the_results_the_rows(wheel) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bench"}
    kept = [*ROOT.glob("results/published/*/rows.parquet"), *ROOT.glob("results/published/*/frontier.json")]
    assert {name for name in names if "results" in name} == {f"bench/{file.relative_to(ROOT)}" for file in kept}
    assert not [name for name in names if "test_" in name]
    data = ("bench/reporting/page.html.j2", "bench/reporting/chooser.js")
    for name in ("bench/methods/prior.py", "bench/metrics/reward.py", *data):
        assert name in names
    assert wheel.stat().st_size < 53e6  # the weights, which may take 52 MB, and rows
