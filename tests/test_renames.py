"""Settings of earlier versions' rows, in the names of this version."""

import json
from typing import Any

import pandas as pd
import pytest
from scaffold import ROOT

from bench.config import from_settings
from bench.errors import BenchError
from bench.renames import current
from bench.reporting.rows import FINGERPRINT
from bench.runs.rows import comparable_settings


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


def test_a_setting_that_is_now_another_methods_is_refused() -> None:
    with pytest.raises(BenchError, match=r"method.surrogate = 'mask' was a setting of 'grpo_guard'"):
        current({"method.name": "grpo_guard", "method.surrogate": "mask"})
