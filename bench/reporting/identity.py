"""The identity of a run: which rows are of one run, whichever version of the benchmark wrote them.

Tables, `bench pack`, `merge`, `reproduce` and `verify` go by it. A run's folder is named and found by `RunConfig.hash`,
which also holds the suite's name and what is measured when: they change what the folder contains, but not the run.
"""

import json
from functools import cache

import pandas as pd

from bench.renames import renamed

RUN = ["method", "settings", "seed", "evaluation"]  # of rows with canonical settings: equal in these, one run
MEASUREMENT = [*RUN, "metric", "budget"]


@cache
def canonical(settings: str) -> str:
    """A row's settings (JSON) in the names of this version, with those that came later; equal settings, equal texts."""
    return json.dumps(renamed(json.loads(settings)), sort_keys=True)


def identified(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with canonical settings, so that the columns `RUN` identify their runs."""
    texts = {text: canonical(text) for text in rows["settings"].unique()}
    return rows.assign(settings=rows["settings"].map(texts).astype(object))  # a text each, however many rows
