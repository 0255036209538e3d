"""Settings of rows that earlier versions published: this version builds their configuration."""

import json

import pandas as pd
import pytest
from scaffold import ROOT

from bench.config import from_settings
from bench.errors import BenchError
from bench.publish.reproduce import config_of
from bench.renames import current

COLUMNS = ["run", "settings", "method", "reward", "metric", "budget", "seed"]
PUBLISHED = sorted((ROOT / "results" / "published").glob("*/rows.parquet"))


def methods() -> list:
    """The published rows of one run of every method of every table."""
    found = []
    for path in PUBLISHED:
        rows = pd.read_parquet(path, columns=COLUMNS)
        names = rows["settings"].map(lambda text: json.loads(text)["method.name"])
        for name, of_method in rows.groupby(names):
            run = of_method["run"].iloc[0]
            found.append(pytest.param(of_method[of_method["run"] == run], id=f"{path.parent.name}-{name}"))
    return found


@pytest.mark.parametrize("rows", methods())
def test_every_published_run_has_a_configuration(rows: pd.DataFrame) -> None:
    """As `bench reproduce` makes it, which checks that every setting of the row, under its name now, is in it."""
    config = config_of(rows, [])
    settings = current(json.loads(rows["settings"].iloc[0]))
    assert config.method.name == settings["method.name"]


def test_a_setting_that_made_another_method_is_refused() -> None:
    path = next(path for path in PUBLISHED if path.parent.name == "ring")
    texts = pd.read_parquet(path, columns=["settings"])["settings"].unique()
    nft = next(own for own in map(json.loads, texts) if own["method.name"] == "nft")
    assert current(nft)["method.kl"] == 1e-4
    with pytest.raises(BenchError, match="'none' was a setting of 'nft'"):
        from_settings(nft | {"method.weight": "none"}, [])
