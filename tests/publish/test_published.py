"""Published rows: done again, verified, packed, merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bench.environment import ROOT, revision
from bench.reporting.agreement import agreement, sentence
from bench.reporting.amplified import AMPLIFIED, amplified
from bench.reporting.rows import read_rows, write_rows

PUBLISHED = ROOT / "results" / "published"


def test_the_verdicts_of_agreement() -> None:
    def frame(values: list[float | None], versions: list[int]) -> pd.DataFrame:
        numbers = range(len(values))
        return pd.DataFrame(
            {"budget": 5, "metric": [f"m{i}" for i in numbers], "value": values, "metric_version": versions,
             "standard_error": 0.1}
        )  # fmt: skip

    published = frame([1.0, 1.0, 1.0, 1.0, None, None, 1.0, 1.0], [1] * 8)
    again = frame([1.0, 1.00001, 1.25, 1.4, None, 2.0, 1.0], [1] * 6 + [2])
    found = agreement(published, again)
    expected = ["equal", "rounding", "noise", "differs", "equal", "missing", "other version", "missing"]
    assert list(found["verdict"]) == expected
    assert found["errors"][3] == pytest.approx(4)
    assert sentence(found).startswith("8 values: 2 equal, 1 rounding, 1 noise, 1 differs, 2 missing, 1 other version;")


@pytest.fixture(scope="module")
def chaotic() -> pd.DataFrame:
    """Published rows of a method whose training is chaotic, ten seeds."""
    rows = read_rows(PUBLISHED / "ring")
    return rows[rows["method"] == "adjoint_matching"]


def test_a_distance_near_zero_is_held_against_the_deviation_of_its_floor() -> None:
    rows = {
        "budget": 5,
        "metric": ["kid", "kid/floor", "fid"],
        "metric_version": 1,
        "standard_error": [None, 0.1, None],
    }
    published = pd.DataFrame(rows | {"value": [-1e-4, 0.0, 1e-4]})
    again = pd.DataFrame(rows | {"value": [1e-4, 0.0, -1e-4]})
    assert list(agreement(published, again)["verdict"]) == ["noise", "equal", "differs"]


def verdicts(rows: pd.DataFrame, change: Callable[[pd.DataFrame], pd.Series], places: pd.Series) -> set[str]:
    """The verdicts on seed 0 if it is done again and has other values in these places."""
    one = rows[rows["seed"] == 0]
    again = one.assign(value=one["value"].mask(places, change(one)))
    return set(amplified(agreement(one, again), rows)["verdict"])


def test_rounding_that_training_amplified_is_told_from_what_it_cannot_be(chaotic: pd.DataFrame) -> None:
    places = ["budget", "metric"]
    one = chaotic[chaotic["seed"] == 0]
    seed = chaotic[chaotic["seed"] == 4].set_index(places)["value"]
    first, last = one["budget"] == one["budget"].min(), one["budget"] == one["budget"].max()
    trained = ~one["metric"].str.endswith("/floor")

    def another(rows: pd.DataFrame) -> pd.Series:  # as unlike as another seed
        return pd.Series(seed.reindex(pd.MultiIndex.from_frame(rows[places])).to_numpy(), rows.index)

    def shifted(rows: pd.DataFrame) -> pd.Series:  # the same, and at first a little too much for rounding
        return another(rows).mask(first, rows["value"] + 1.5 * rows["standard_error"])

    def floor_too(rows: pd.DataFrame) -> pd.Series:  # what training does not touch
        return another(rows).where(trained, rows["value"] + 4 * rows["standard_error"])

    found = verdicts(chaotic, another, trained & ~first)
    assert AMPLIFIED in found
    assert found <= {"equal", "rounding", "noise", AMPLIFIED}
    excused = [
        verdicts(chaotic, another, trained),
        verdicts(chaotic, shifted, trained),
        verdicts(chaotic, lambda rows: 30 * another(rows), trained & ~first),  # farther than seeds are
        verdicts(chaotic, lambda rows: 0.9 * rows["value"], last & (one["metric"] == "path_kl")),  # one number alone
        verdicts(chaotic, floor_too, ~first),
        verdicts(chaotic[chaotic["seed"].isin([0, 4])], another, trained & ~first),  # a spread of two seeds
    ]
    assert ["differs" in found for found in excused] == [True] * 6
    assert [AMPLIFIED in found for found in excused] == [False, False, True, False, True, False]


@pytest.fixture
def runs(tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of three updates, as if made by an unchanged commit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ["evaluation.samples_per_prompt=64", "evaluation.at=[1]", "train.updates=3"]
    sets = [word for setting in settings for word in ("--set", setting)]
    status, text = bench("run", "--model", "ring", "--method", "draft_1", "--out", tmp_path / "runs" / "one", *sets)
    assert status == 0, text
    change(tmp_path / "runs" / "one", dirty=False, revision=revision()[0])
    return tmp_path / "runs"


def change(run: Path, **columns: object) -> None:
    """Rewrite columns of a run's rows."""
    for path in run.glob("rows*.parquet"):
        rows = read_rows(path).assign(**columns)
        write_rows(path, rows.astype(object).where(rows.notna(), None).to_dict("records"))


def test_a_run_is_reproduced_from_its_rows_and_verified_from_its_pack(runs: Path, tmp_path: Path, bench) -> None:
    status, text = bench("pack", runs, "--out", tmp_path / "pack")
    assert status == 0, text
    status, text = bench("verify", tmp_path / "pack" / "one")
    assert status == 0, text
    assert "values: 10 equal." in text
    shutil.rmtree(runs / "one" / "checkpoints")  # the rows alone are enough
    status, text = bench("reproduce", runs, "--method", "draft_1", "--seed", 0, "--out", tmp_path / "again")
    assert status == 0, text
    assert "values: 20 equal." in text
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
