"""Published rows: done again, verified, packed, merged."""

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

from bench.config import resolve
from bench.environment import revision
from bench.publish import reproduce
from bench.renames import ADDED
from bench.reporting.agreement import TOLD
from bench.reporting.rows import COLUMNS, read_rows, write_rows
from bench.runs.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three updates, as if made by an unchanged commit."""
    folder = tmp_path_factory.mktemp("made")
    settings = ["evaluation.samples_per_prompt=64", "evaluation.at=[1]", "train.updates=3"]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as held:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config = resolve("draft_1", suite="ring", assignments=settings)
        Run(config, folder / "runs" / "one", Console(file=io.StringIO())).go(False, held)
    change(folder / "runs" / "one", dirty=False, revision=revision()[0])
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    return shutil.copytree(made / "runs", tmp_path / "runs")


def change(run: Path, **columns: object) -> None:
    """Rewrite columns of a run's rows."""
    for path in run.glob("rows*.parquet"):
        store(path, read_rows(path).assign(**columns))


def store(path: Path, rows: pd.DataFrame) -> None:
    write_rows(path, rows.astype(object).where(rows.notna(), None).to_dict("records"))


def alter(path: Path, column: str, number: int = 0) -> tuple[object, object]:
    """Change a column of one row in a file; its entry before and now."""
    rows = read_rows(path).astype(object)
    before = rows[column].iloc[number]
    rows.iloc[number, list(rows).index(column)] = now = (
        json.dumps(json.loads(before) | {"optimizer.lr": 0.5}) if column in ("settings", "packages")
        else {"direction": "none", "status": "refused", "support": "share"}.get(column, f"{before}x")
        if isinstance(before, str)
        else not before if column in ("dirty", "prior_is_best") else before + 1
    )  # fmt: skip
    store(path, rows)
    return before, now


def as_of_an_earlier_version(run: Path) -> None:
    """Take from a run's rows and configuration what came later, and give it the name that it had then."""
    for path in run.glob("rows*.parquet"):
        rows = read_rows(path)
        lacking = {key: value for key, value in json.loads(rows["settings"].iloc[0]).items() if key not in ADDED}
        store(path, rows.assign(settings=json.dumps(lacking), config_hash="0" * 16, run="draft_1-seed0-00000000"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ADDED:
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        del node[name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_run_is_reproduced_from_its_rows_and_verified_from_its_pack(runs: Path, tmp_path: Path, bench) -> None:
    status, text = bench("pack", runs, "--out", tmp_path / "pack")
    assert status == 0, text
    status, text = bench("verify", tmp_path / "pack" / "one")
    assert status == 0, text
    assert "values: 14 equal." in text
    shutil.rmtree(runs / "one" / "checkpoints")  # the rows alone are enough
    status, text = bench("reproduce", runs, "--method", "draft_1", "--seed", 0, "--out", tmp_path / "again")
    assert status == 0, text
    assert "values: 28 equal." in text
    change(tmp_path / "pack" / "one", value=0.125)
    status, text = bench("verify", tmp_path / "pack" / "one")
    assert status == 1
    assert "differs" in text
    for arguments, word in ((["--run", "rtb"], "no run in"), (["--method", "draft"], "did you mean")):
        status, text = bench("reproduce", runs, *arguments)
        assert (status, word in text) == (2, True), text


def test_a_pack_tells_nothing_of_the_machine(runs: Path, tmp_path: Path, bench) -> None:
    file = runs / "one" / "environment.json"
    before = file.read_text()
    for text, word in (('"hf_' + "a" * 30 + '"', "holds a token"), ('"/data/models/mine"', "names /data/models/mine")):
        file.write_text(json.dumps(json.loads(before) | {"note": json.loads(text)}))
        status, told = bench("pack", runs, "--out", tmp_path / "pack.zip")
        assert (status, word in told) == (2, True), told
        assert not (tmp_path / "pack.zip").exists()


def test_merging_takes_good_runs_once_and_names_every_fault(runs: Path, tmp_path: Path, bench) -> None:
    pack, published = tmp_path / "pack", tmp_path / "published"
    shutil.copy(runs / "one" / "config.yaml", runs / "one" / "adapter")  # as a pipeline's adapter has it
    assert bench("pack", runs, "--out", pack)[0] == bench("pack", runs, "--out", tmp_path / "pack.zip")[0] == 0
    status, text = bench("merge", tmp_path / "pack.zip", published)
    assert (status, "1 runs added" in text) == (0, True), text
    rows = read_rows(published)
    assert sorted(rows["budget"].unique()) == [1, 3]
    before = (published / "rows.parquet").read_bytes()
    status, text = bench("merge", pack, published)
    assert (status, "0 runs added" in text, "1 were there already" in text) == (0, True, True)

    def faulty(damage: Callable[[Path], object]) -> str:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(pack, tmp_path / "bad")
        damage(tmp_path / "bad" / "one")
        status, text = bench("merge", tmp_path / "bad", published)
        assert status == 2
        return text

    def other_evaluation(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["seed"] = 7
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    assert "not those of its config.yaml" in faulty(lambda run: change(run, seed=3))
    text = faulty(lambda run: change(run, dirty=True, evaluation="0" * 16, metric_version=9, revision="f" * 40))
    assert "the code had changes" in text
    assert "is no commit of this repository" in text
    assert "evaluated on other samples than its config.yaml says" in text
    assert "not those of its config.yaml" in faulty(other_evaluation)
    assert "other versions of" in faulty(lambda run: change(run, metric_version=9))
    assert "other contents here" in faulty(lambda run: (run / "contents.json").write_text('{"prompts.name": "0"}'))
    assert "cannot be read" in faulty(lambda run: (run / "rows.parquet").write_bytes(b"PAR1"))
    assert (published / "rows.parquet").read_bytes() == before


def test_verify_finds_what_was_altered_in_any_column(runs: Path, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are those of the checkpoint; what depends on the machine is listed as not verified."""
    path = runs / "one" / "rows.parquet"
    whole = path.read_bytes()
    evaluated = reproduce.evaluate_stored(runs / "one", [], Console(file=io.StringIO()))
    monkeypatch.setattr(reproduce, "evaluate_stored", lambda *arguments: evaluated)  # once is enough
    assert bench("verify", runs / "one")[0] == 0
    for name in COLUMNS.keys() - set(TOLD):
        alter(path, name)
        status, text = bench("verify", runs / "one")
        assert status == (2 if name == "schema" else 1), f"{name}: {text}"  # rows of another schema are not read
        path.write_bytes(whole)
    for name in TOLD:
        alter(path, name)
    status, text = bench("verify", runs / "one")
    assert status == 0
    assert set(re.findall(r"[\w-]+", text.partition("Not verified, as nothing is trained:")[2])) >= {
        *TOLD,
        "rows-at-0000001",
    }


def test_a_pack_that_states_too_small_a_cost_is_found(runs: Path, tmp_path: Path, bench) -> None:
    assert bench("pack", runs, "--out", tmp_path / "pack")[0] == 0
    forwards = read_rows(runs / "one" / "rows.parquet")["network_forwards"].iloc[0]
    change(tmp_path / "pack" / "one", network_forwards=forwards - 1)
    status, text = bench("verify", tmp_path / "pack" / "one")
    assert status == 1
    assert f"network_forwards is {forwards - 1:,}, at least {forwards:,}" in text
    assert f"network_forwards (only that it is at least {forwards:,})" in text


def test_a_run_of_an_earlier_version_is_the_same_run(runs: Path, tmp_path: Path, bench) -> None:
    """Done again it is reported as one, packed with the first as one, and merged as one that is there."""
    shutil.copytree(runs / "one", tmp_path / "old" / "one")
    as_of_an_earlier_version(tmp_path / "old" / "one")
    for pack in ("old", "runs"):
        assert bench("pack", tmp_path / pack, "--out", tmp_path / f"{pack}.zip")[0] == 0
    published = tmp_path / "published"
    status, text = bench("merge", tmp_path / "old.zip", published)
    assert (status, "1 runs added" in text) == (0, True), text
    before = (published / "rows.parquet").read_bytes()
    status, text = bench("merge", tmp_path / "runs.zip", published)
    assert (status, "0 runs added" in text, "1 were there already" in text) == (0, True, True), text
    assert (published / "rows.parquet").read_bytes() == before
    status, text = bench("report", published, runs)
    assert (status, "with other values" in text) == (0, False), text
    status, text = bench("pack", tmp_path, "--out", tmp_path / "both.zip")
    assert (status, "holds a run that another folder holds too" in text, "1 runs are in" in text) == (0, True, True), (
        text
    )
    status, text = bench("reproduce", published, "--method", "draft_1", "--out", tmp_path / "again")
    assert (status, "values: 28 equal." in text) == (0, True), text
    status, text = bench("verify", tmp_path / "old" / "one")
    assert (status, "values: 14 equal." in text) == (0, True), text
    assert "Not verified, as nothing is trained: run, config_hash" in text  # they hold another version's hash


def test_packs_that_contradict_are_refused_and_counts_are_of_what_changed(runs: Path, tmp_path: Path, bench) -> None:
    pack, other, published = tmp_path / "pack", tmp_path / "other", tmp_path / "published"
    assert bench("pack", runs, "--out", pack)[0] == 0
    status, text = bench("merge", pack, pack, published)  # the same twice
    assert (status, "1 runs added" in text, "1 were there already" in text) == (0, True, True), text
    rows = read_rows(published)
    assert len(rows) == 28
    shutil.copytree(pack, other)
    before, now = alter(other / "one" / "rows.parquet", "value", 3)
    metric = read_rows(other / "one" / "rows.parquet")["metric"][3]
    for target, packs in ((published, [other]), (tmp_path / "new", [pack, other])):
        written = sorted(target.glob("*"))
        status, text = bench("merge", *packs, target)
        assert status == 2
        assert f"another value of {metric} at 3 updates: {before} there, {now} here." in text.replace("\n", " ")
        assert sorted(target.glob("*")) == written
    pd.testing.assert_frame_equal(read_rows(published), rows)
    shutil.rmtree(runs / "two", ignore_errors=True)
    shutil.copytree(other / "one", runs / "two")
    status, text = bench("pack", runs, "--out", tmp_path / "both")
    assert (status, f"another value of {metric} at 3 updates" in text) == (2, True), text

    store(published / "rows.parquet", rows[rows["metric"] != metric])  # measured by the pack alone
    status, text = bench("merge", pack, published)
    assert (status, "0 runs added" in text, "1 that were there have new rows" in text) == (0, True, True), text
    assert len(read_rows(published)) == 28

    failed = rows.iloc[:1].assign(metric="run", value=None, status="failed", direction="none")
    store(published / "rows.parquet", failed)
    status, text = bench("merge", pack, published)
    assert (status, "has failed there and finished here" in text) == (2, True), text
