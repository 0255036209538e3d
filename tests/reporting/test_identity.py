"""Which rows are of one run: whatever version wrote them, equal settings are one, and others are never averaged."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from example_rows import row
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from bench.reporting.identity import RUN, canonical, identified
from bench.reporting.report import Question, compared, text
from bench.reporting.rows import write_rows
from bench.reporting.selection import collect

# what held before there were these settings, written down here by hand
BEFORE = {
    "train.guidance": None,
    "evaluation.sampler.guidance": None,
    "model.negative_prompt": "",
    "model.size": None,
    "model.frames": 1,
    "model.lora.target_modules": None,
    "model.lora.use_dora": False,
    "model.lora.init": "gaussian",
    "train.max_path_kl": None,
    "method.kl": 0.0,  # of draft
    "method.penalty": "path",
    "prompts.split": "every_fifth",
    "evaluation.test_prompts": 0,
    "model.quantize": None,
}
OPTIONAL = {
    "train.guidance": st.sampled_from([None, 1.0, 5.0]),
    "model.lora.use_dora": st.booleans(),
    "model.lora_rank": st.sampled_from([4, 8]),  # a former name
    "optimizer.lr": st.sampled_from([0.001, 0.01]),
    "method.strength": st.sampled_from([None, 0, 1, "–"]),  # of a plugin: nobody knows what held without it
}
SETTINGS = st.fixed_dictionaries({"method.name": st.just("draft")}, optional=OPTIONAL)
RUNS = st.lists(st.tuples(SETTINGS, st.integers(0, 1)), min_size=2, max_size=6)


def meaning(own: dict[str, Any]) -> str:
    """What the settings of a row say, by hand."""
    now = {{"model.lora_rank": "model.lora.rank"}.get(key, key): value for key, value in own.items()}
    return json.dumps(BEFORE | now, sort_keys=True)


@examples(max_examples=12, deadline=None)
@given(RUNS)
def test_equal_identity_is_one_row_of_a_table_and_unlike_runs_are_never_averaged(
    runs: list[tuple[dict[str, Any], int]],
) -> None:
    wanted: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (own, seed) in enumerate(runs):
            of_seed = wanted.setdefault(meaning(own), {})
            value = of_seed.setdefault(seed, float(number))
            one = row(settings=json.dumps(own), seed=seed, value=value, run=f"r{number}", difference=value)
            write_rows(Path(folder, f"{number}.parquet"), [one])
        frame, left_out = collect([Path(folder)])
    assert not left_out
    assert len(frame) == sum(map(len, wanted.values()))
    report = compared(frame, Question(("reward/train",)))
    (section,) = report.sections
    lines = {line.name: line for line in section.boards[0].lines if line.n}
    assert len(lines) == len(wanted)
    assert text(report, [])
    meanings = [meaning(json.loads(settings)) for settings in section.rows["settings"]]
    names = dict(zip(meanings, section.rows["row"], strict=True))
    for key, values in wanted.items():
        assert lines[names[key]].n == str(len(values))
        assert lines[names[key]].cells[0].value == pytest.approx(sum(values.values()) / len(values))


@examples(max_examples=100)
@given(SETTINGS, SETTINGS)
def test_texts_are_equal_where_the_settings_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (canonical(json.dumps(one)) == canonical(json.dumps(other))) == (meaning(one) == meaning(other))
    assert canonical(canonical(json.dumps(one))) == canonical(json.dumps(one))


def test_the_prior_the_seed_and_the_samples_are_part_of_it(tmp_path: Path) -> None:
    fingerprints = [json.dumps({"model.fingerprint": name}) for name in "ab"]
    changes = [{}, {"seed": 1}, {"evaluation": "e2"}, *({"settings": text} for text in fingerprints)]
    write_rows(tmp_path / "rows.parquet", [row(value=float(i), **one) for i, one in enumerate(changes)])
    frame, _ = collect([tmp_path])
    assert len(frame) == len(identified(frame)[RUN].drop_duplicates()) == len(changes)
