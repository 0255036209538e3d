"""What a run warns of although its numbers are finite."""

import logging
import re

import pytest
import torch

from bench.evaluation.alarms import Alarms
from bench.metric import Measurement
from bench.reporting.rows import read_rows


def reward(difference: float, error: float = 0.1) -> Measurement:
    return Measurement("reward/train", 1 + difference, 1.0, difference, error, degrees=20, n=21)


@pytest.mark.parametrize(
    ("losses", "update"),
    [
        ([1.0] * 6 + [2e4, 9e8], 7),  # once, at the first
        ([1.0] * 6 + [9e3], None),
        ([1e-9, 1.0, 1e-9, 1.0, 1e-9, 1.0], None),  # a policy gradient's, zero in a round's first update
        ([0.0, 0.0, 5.0, 5.0], None),
    ],
)
def test_a_loss_that_jumps(losses, update, caplog):
    alarms = Alarms(1.0)
    with caplog.at_level(logging.WARNING):
        for number, loss in enumerate(losses, 1):
            alarms.update({"update": number, "loss": loss})
    assert len(caplog.records) == (update is not None)
    (noted,) = alarms.noted([reward(0.5)])
    assert (f"at update {update}" in noted.note) == (update is not None)


@pytest.mark.parametrize(
    ("found", "name", "word"),
    [
        ([reward(-1.0), Measurement("path_kl", 3.0)], "reward/train", "fell below the prior's"),
        ([reward(-0.1), Measurement("path_kl", 3.0)], None, ""),  # within its error
        ([reward(5.0), Measurement("path_kl", 900.0)], "path_kl", "exploded"),
        ([reward(50.0), Measurement("path_kl", 900.0)], None, ""),  # strong tilt: β × gain is 250 nats
        ([reward(0.5), Measurement("path_kl", None, note="no transition densities")], None, ""),
    ],
)
def test_what_an_evaluation_shows(found, name, word, caplog):
    alarms = Alarms(5.0)
    with caplog.at_level(logging.WARNING):
        noted = alarms.noted(found), alarms.noted(found)
    assert [one.name for one in noted[0] if one.note and one.value is not None] == ([name] if name else [])
    assert noted[0] == noted[1]
    assert len(caplog.records) == (name is not None)
    assert all(word in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.5, 0.1, *[0.05] * 8], "step 1 of 10 holds 50% of it"),
        ([0.29, *[0.0789] * 9], ""),
        ([0.0] * 19 + [0.4, 0.4, 0.2], "step 20 of 22 holds 40% of it"),
        ([0.5, 0.25, 0.25], ""),  # of three steps one has a third anyway
    ],
)
@pytest.mark.parametrize("nats", [0.05, 20.0])
def test_a_step_that_holds_most_of_the_kl(shares, said, nats, caplog):
    alarms, step_kl = Alarms(5.0), nats * torch.tensor([shares, shares])
    said = said if nats > 1 else ""  # of next to nothing the shares do not matter
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (noted,) = alarms.noted([Measurement("path_kl", nats)], step_kl)
    assert noted.note.startswith(said) and bool(noted.note) == bool(said)
    assert [said in record.getMessage() for record in caplog.records] == [True] * bool(noted.note)
    assert not noted.note or "sampler.spacing=logsnr" in noted.note


def test_a_run_notes_them_in_its_rows(bench, tmp_path, monkeypatch):
    """Far too high a learning rate, on the ring."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ("--set", "optimizer.lr=0.05", "--set", "evaluation.samples_per_prompt=256")
    status, text = bench("run", "draft_1", "--model", "ring", "--updates", 8, "--out", tmp_path / "run", *settings)
    assert status == 0, text
    notes = read_rows(tmp_path / "run" / "rows.parquet").set_index("metric")["note"]
    assert "exploded" in notes["path_kl"]
    assert "fell below the prior's" in notes["reward/train"]
    assert re.search(r"path_kl: [^:]*exploded", " ".join(text.split()))  # below the table
