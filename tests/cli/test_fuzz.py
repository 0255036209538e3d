"""Whatever a setting, a file or a folder holds: it is taken as it is written, or refused in one sentence.

A few examples of each kind in the ordinary suite, many with `-m slow`; the same ones every time.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench import config as configs
from bench.cli.app import app
from bench.config import resolve
from bench.errors import BenchError
from bench.models.catalogue import load_model, make_kernel
from bench.prompts import load_prompts
from bench.runs.estimate import estimate_memory
from bench.runs.preflight import check
from bench.runtime import yaml_text

EXAMPLES = {"ordinary": 1, "slow": 25}


def fuzzed(examples: int, **strategies: Any) -> Callable:
    """A test of so many examples, and one of `EXAMPLES["slow"]` times as many that is marked slow."""

    def decorate(test: Callable) -> Any:
        def run(level: str, **fixtures: Any) -> None:
            options = {"derandomize": True, "deadline": None, "database": None, "phases": [Phase.generate]}
            options |= {"suppress_health_check": list(HealthCheck), "max_examples": examples * EXAMPLES[level]}
            settings(**options)(given(**strategies)(lambda **drawn: test(**drawn, **fixtures)))()

        return run

    return decorate


levels = pytest.mark.parametrize("level", ["ordinary", pytest.param("slow", marks=pytest.mark.slow)])


def outcome(*arguments: object) -> tuple[int, str]:
    """Call the command line: its status and what it printed. What is no exit is raised."""
    import sys

    before, sys.argv = sys.argv, ["bench", *map(str, arguments)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            app()
        return 0, said.getvalue()
    except SystemExit as stop:
        return stop.code or 0, said.getvalue()
    finally:
        sys.argv = before


# --- values ---------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-2, 4), st.floats(width=32),
    st.text(max_size=6),
    st.sampled_from(["auto", "lora", "full", "emoji", "ring", "linear", "ddim", "sde", "1e-4", "010", "", "~", "a.b"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def setting_keys() -> list[str]:
    """Every setting of a method with options of its own, and some that there are not."""
    config = resolve("rtb", suite="ring")
    known = list(configs._keys(type(config)))
    return [
        *known,
        *(f"{key}.x" for key in known[:9]),
        *(key[:-1] for key in known[:9]),
        "",
        ".",
        "..",
        "train",
        "model",
    ]


@levels
def test_settings(level: str) -> None:
    @fuzzed(60, key=st.sampled_from(setting_keys()), value=VALUES, method=st.sampled_from(["rtb", "ddpo", "alignprop"]))
    def one(key: str, value: Any, method: str) -> None:
        text = f"{key}={json.dumps(value)}"
        try:
            config = resolve(method, suite="ring", assignments=[text])
            check(config)
        except BenchError as error:
            assert str(error).strip()
            return
        if isinstance(value, dict):
            return  # its entries are settings of their own
        found = attrgetter(key)(config)
        found = list(found) if isinstance(found, tuple) else found
        given = yaml_text.parse(json.dumps(value))
        if isinstance(given, str) and isinstance(found, int | float):
            given = float(given)  # a number in quotes is a number
        assert found == given, text

    one(level=level)


# --- prompt files ---------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf8", "surrogatepass")),
    st.lists(st.text(max_size=8), max_size=5).map(
        lambda lines: ("prompt\n" + "\n".join(lines)).encode("utf8", "ignore")
    ),
    VALUES.map(lambda value: json.dumps(value).encode()),
)


@levels
def test_prompt_files(level: str, tmp_path: Path) -> None:
    @fuzzed(80, content=TEXTS, suffix=st.sampled_from([".txt", ".json", ".csv", ".parquet", "", ".yaml"]))
    def one(content: bytes, suffix: str) -> None:
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(content)
        try:
            found = load_prompts(str(path))
        except BenchError as error:
            assert str(path) in str(error)
            return
        prompts = found.all
        assert prompts and all(prompt == prompt.strip() != "" for prompt in prompts)
        assert len(set(prompts)) == len(prompts)

    one(level=level)


# --- pipelines ------------------------------------------------------------------------------------------------------


def json_leaves(folder: Path) -> list[tuple[str, str]]:
    """File and key of every entry of a pipeline's configurations."""
    files = ["model_index.json", *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))]
    files.append("scheduler/scheduler_config.json")
    return [(file, key) for file in files for key in json.loads((folder / file).read_text())]


@pytest.mark.slow
@levels
def test_model_configurations(level: str, pipeline_folder: Path) -> None:
    places = json_leaves(pipeline_folder)

    @fuzzed(12, place=st.sampled_from(places), value=VALUES, gone=st.booleans())
    def one(place: tuple[str, str], value: Any, gone: bool) -> None:
        file, key = place
        with tempfile.TemporaryDirectory() as scratch:
            folder = shutil.copytree(pipeline_folder, Path(scratch) / "model")
            tree = json.loads((folder / file).read_text())
            tree |= {} if gone else {key: value}
            if gone:
                del tree[key]
            (folder / file).write_text(json.dumps(tree))
            overrides = {"model.name": str(folder), "train.micro_batch": 1}
            config = resolve("draft_1", reward="colorfulness", overrides=overrides)
            try:
                check(config)
                estimate_memory(config, torch.float32)
            except BenchError as error:
                assert str(folder) in str(error)
                return
            model = load_model(config.model, config.sampler)
            make_kernel(model.spec, config.sampler)
            z = torch.zeros(1, *model.latent_shape)
            assert model.decode(model.predict(z, torch.tensor(500), model.encode(["cat"]))).shape[:2] == (1, 3)

    one(level=level)


# --- run folders and stores of results ------------------------------------------------------------------------------

RING = ("--model", "ring", "--updates", 2, "--set", "evaluation.samples_per_prompt=64", "--set",
        "evaluation.metrics=[reward]", "--set", "train.checkpoint_every=1", "--set", "evaluation.at=[1]",
        "--set", "train.updates_per_round=1")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run, and a cache for all."""
    scratch = tmp_path_factory.mktemp("fuzz")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    status, text = outcome("run", "--method", "nabla_gfn", *RING, "--out", scratch / "run")
    assert status == 0, text
    yield scratch / "run"
    os.environ.pop("XDG_CACHE_HOME")
    if before:
        os.environ["XDG_CACHE_HOME"] = before


DAMAGE: dict[str, Callable[[bytes, float], bytes | None]] = {
    "gone": lambda data, share: None,
    "empty": lambda data, share: b"",
    "cut": lambda data, share: data[: int(share * len(data))],
    "flipped": lambda data, share: (
        data and data[: (i := int(share * (len(data) - 1)))] + bytes([data[i] ^ 8]) + data[i + 1 :]
    ),
    "another's": lambda data, share: b'{"a": [1, null]}',
    "zeros": lambda data, share: bytes(len(data)),
}


@pytest.mark.slow
@levels
def test_run_folders(level: str, finished: Path) -> None:
    files = sorted(str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and p.suffix != ".png")
    files = [file for file in files if not file.startswith(("tensorboard", ".lock"))]

    @fuzzed(
        12,
        damaged=st.lists(st.tuples(st.sampled_from(files), st.sampled_from(sorted(DAMAGE))), min_size=1, max_size=3),
        share=st.floats(0, 1),
        unfinished=st.booleans(),
    )
    def one(damaged: list[tuple[str, str]], share: float, unfinished: bool) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = shutil.copytree(finished, Path(scratch) / "run")
            if unfinished:
                (folder / "rows.parquet").unlink()
            for file, kind in damaged:
                path = folder / file
                data = DAMAGE[kind](path.read_bytes(), share) if path.is_file() else None
                path.unlink(missing_ok=True)
                if data is not None:
                    path.write_bytes(data)
            for command in (
                ("report", folder),
                ("eval", folder, "--set", "evaluation.samples_per_prompt=65"),
                ("run", "--method", "nabla_gfn", *RING, "--out", folder),
            ):
                status, text = outcome(*command)
                assert status in (0, 2), (command, text)
                assert status == 0 or "Error:" in text
                assert "Traceback" not in text

    one(level=level)


@levels
def test_stores_of_results(level: str, finished: Path) -> None:
    """A table with a column gone, of another type, or with other values."""
    import pandas as pd

    frame = pd.read_parquet(finished / "rows.parquet")

    @fuzzed(15, column=st.sampled_from(list(frame.columns)), value=SCALARS, gone=st.booleans())
    def one(column: str, value: Any, gone: bool) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = shutil.copytree(finished, Path(scratch) / "run")
            changed = frame.drop(columns=column) if gone else frame.assign(**{column: [value] * len(frame)})
            try:
                changed.to_parquet(folder / "rows.parquet")
            except (OverflowError, ValueError, UnicodeError):  # what Parquet cannot hold
                return
            status, text = outcome("report", folder)
            assert status in (0, 2), text
            assert status == 0 or "Error:" in text

    one(level=level)
