"""The command of a published row makes the row's configuration."""

import json
import shlex
from typing import Any

import pandas as pd
import pytest
from scaffold import ROOT

from bench.config import from_settings, resolve
from bench.publish.command import command
from bench.reporting.rows import FINGERPRINT
from bench.runs.rows import comparable_settings


def made_by(line: str) -> dict[str, Any]:
    """The settings of the run that a command begins."""
    words = shlex.split(line)
    assert words[:2] == ["bench", "run"]
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    keys = {"--model": "model.name", "--prompts": "prompts.name", "--updates": "train.updates"}
    given = {keys[option]: value for option, value in pairs if option in keys}
    if "train.updates" in given:
        given["train.updates"] = int(given["train.updates"])
    assignments = [value for option, value in pairs if option == "--set"]
    return comparable_settings(
        resolve(words[2], reward=dict(pairs)["--reward"], overrides=given, assignments=assignments)
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results" / "published").glob("*/rows.parquet")), ids=lambda p: p.parent.name
)
def test_the_command_of_a_published_row_makes_its_configuration(path) -> None:
    for text in pd.read_parquet(path, columns=["settings"])["settings"].unique():
        settings = json.loads(text)
        settings.pop(FINGERPRINT, None)
        updates = 0 if settings["method.name"] == "best_of_n" else 3
        wanted = settings | ({"train.updates": updates} if updates else {})
        line = command(settings, updates)
        assert made_by(line) == comparable_settings(from_settings(wanted, []))
        assert ("--set optimizer.lr=" in line) == bool(updates)
