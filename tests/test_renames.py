"""Settings of earlier versions' rows, in the names of this version."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scaffold import ROOT

from bench.config import from_settings
from bench.errors import BenchError
from bench.prompts import SPLITS, load_prompts
from bench.publish.compare import compare
from bench.publish.merge import _strange
from bench.renames import FINGERPRINTS, current, current_metric
from bench.reporting.agreement import agreement
from bench.reporting.rows import FINGERPRINT, read_rows, write_rows
from bench.reporting.selection import collect
from bench.reporting.selection import settings as tables
from bench.runs.rows import comparable_settings, evaluation_id


def published() -> dict[str, list[dict[str, Any]]]:
    """The distinct settings of the published rows, by folder and method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((ROOT / "results" / "published").glob("*/rows.parquet")):
        for text in pd.read_parquet(path, columns=["settings"])["settings"].unique():
            settings = json.loads(text)
            settings.pop(FINGERPRINT, None)
            found.setdefault(f"{path.parent.name}-{settings['method.name']}", []).append(settings)
    return found


PUBLISHED = published()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_settings_of_this_version(name: str) -> None:
    for settings in PUBLISHED[name]:
        now = comparable_settings(from_settings(settings, []))
        assert current(settings) == now  # a new setting needs an entry in ADDED


@pytest.mark.parametrize("folder", sorted({name.partition("-")[0] for name in PUBLISHED}))
def test_published_rows_name_the_samples_that_this_version_draws_for_them(folder: str) -> None:
    """What was held out is validation now, for tuning saw it: the first tables have no test part."""
    rows = read_rows(ROOT / "results" / "published" / folder / "rows.parquet")
    config = from_settings({k: v for k, v in json.loads(rows["settings"].iloc[0]).items() if k != FINGERPRINT}, [])
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    assert set(rows["evaluation"]) == {evaluation_id(config, prompts)}
    parts = set(rows.loc[rows["metric"].str.startswith("reward/"), "metric"].str.rpartition("/")[2])
    tested = (
        *("emoji_mixture", "emoji_mixture_colorfulness", "emoji_mixture_flow", "emoji_mixture_long"),
        *("preference_200", "verdict_emoji_flow"),
    )
    other = set() if folder.startswith("ring") else {"test"} if folder in tested else {"validation"}
    assert parts == {"train"} | other
    drawn = set(rows.loc[rows["metric"].str.startswith("reward_prompts/"), "metric"].str.split("/", n=1).str[1])
    assert drawn <= {f"{split}/{prompt}" for split in SPLITS for prompt in getattr(prompts, split)}


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("reward/heldout", "reward/validation"),
        ("reward/hps/heldout", "reward/hps/validation"),
        ("reward/heldout/train", "reward/heldout/train"),  # of a reward of this name
        ("reward_prompts/heldout/a/heldout", "reward_prompts/validation/a/heldout"),
        ("fid_prior/heldout", "fid_prior/heldout"),
        ("path_kl", "path_kl"),
    ],
)
def test_former_names_of_metrics(former: str, now: str) -> None:
    assert current_metric(former) == current_metric(now) == now


def test_a_setting_that_is_now_another_methods_is_refused() -> None:
    with pytest.raises(BenchError, match=r"method.surrogate = 'mask' was a setting of 'grpo_guard'"):
        current({"method.name": "grpo_guard", "method.surrogate": "mask"})


@pytest.fixture(params=list(FINGERPRINTS.items()), ids=str)
def rows(request: pytest.FixtureRequest) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of a published run, and the same as this version makes them, with its fingerprint of the prior."""
    before, now = request.param
    for path in sorted((ROOT / "results" / "published").glob("emoji*/rows.parquet")):
        whole = read_rows(path)
        if before in whole["settings"].iloc[0]:
            old = whole[whole["run"] == whole["run"].iloc[0]]
            return old, old.assign(settings=old["settings"].str.replace(before, now))
    raise AssertionError(f"no published row has {before}")


def test_an_earlier_fingerprint_is_that_of_the_same_prior(rows: tuple, tmp_path: Path) -> None:
    """In a report, where packed runs join published ones, and where a run is done again."""
    old, new = rows
    assert (old["settings"] != new["settings"]).all()
    for name, frame in (("old", old), ("new", new.assign(seed=77, run="another"))):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.parquet", frame.astype(object).where(frame.notna(), None).to_dict("records"))
    frame, _ = collect([tmp_path])
    assert len(list(tables(frame))) == 1
    assert frame["settings"].nunique() == 1
    assert not _strange(new, old) and compare(new, old).known
    other = new.assign(settings=new["settings"].str.replace('"model.fingerprint": "', '"model.fingerprint": "f'))
    assert _strange(other, old) and not compare(other, old).known
    assert set(agreement(old, new)["verdict"]) == {"equal"}
    found = agreement(old, other)
    assert set(found.loc[found["verdict"] == "differs", "column"]) == {"settings"}
