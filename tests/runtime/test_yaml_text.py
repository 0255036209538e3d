"""YAML as it is written."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import config as configs
from bench.config import resolve
from bench.errors import BenchError
from bench.runtime import yaml_text

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
LOOKALIKES = st.sampled_from(
    ["08", "1e5", "yes", "1:30", "2020-01-01", "~", "", "0x1f", "1_0", ".inf", "<<", "=", "\x85"]
)


@settings(max_examples=60, deadline=None)
@given(value=st.recursive(SCALARS | LOOKALIKES, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=5))
def test_what_is_dumped_is_read_again_here_and_by_others(value: object) -> None:
    text = yaml_text.dump({"value": value})
    assert yaml_text.parse(text) == {"value": value}
    assert yaml.safe_load(text) == {"value": value}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "'a' is given twice in line 3"),
        ("a:\n  - {b: [{c: 1, d: 2, c: 3}]}", "'c' is given twice in line 2"),
        ("{1: a, 1: b}", "1 is given twice"),
        ("{a", "expected"),
        ("!!python/object:os.system x", "could not determine a constructor"),
        ("[" * 500, "recursion"),
        ('"\\ud800"', "surrogates not allowed"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        yaml_text.parse(text)


def test_settings_given_twice_are_refused_wherever_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"--set optimizer: .*'lr' is given twice"):
        resolve("rtb", suite="ring", assignments=["optimizer={lr: 1, lr: 2}"])
    path = tmp_path / "config.yaml"
    path.write_text(resolve("rtb", suite="ring").to_yaml() + "seed: 3\n")
    with pytest.raises(BenchError, match="'seed' is given twice in line"):
        configs.read(path)
