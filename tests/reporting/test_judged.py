"""Models that were trained elsewhere, in tables: marked, and at equal cost only by a cost that is stated."""

import json
from pathlib import Path

import pytest

from bench.reporting.budgets import at, within
from bench.reporting.leaderboard import leaderboard
from bench.reporting.rows import read_rows, write_rows
from bench.reporting.selection import collect, settings

ROWS = Path(__file__).parent.parent.parent / "results" / "published" / "emoji"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory):
    """A published setting with two judged models: of one the NFE is stated, of one nothing."""
    frame = read_rows(ROWS)
    frame = frame[frame["method"].isin(["draft", "best_of_n"]) & (frame["status"] == "ok")]
    frame = frame[frame["evaluation"] == frame["evaluation"].mode()[0]]
    most = int((frame["network_forwards"] + frame["network_backwards"]).max())
    last = frame[(frame["method"] == "draft") & (frame["budget"] == frame["budget"].max())]
    added = []
    for label, nfe in {"told": most, "untold": None}.items():
        for one in last.to_dict("records"):
            chosen = {key: v for key, v in json.loads(one["settings"]).items() if not key.startswith("method.")}
            chosen |= {"method.name": "judged", "method.label": label, "method.cost.nfe": nfe}
            stated = "as stated" if nfe else "unknown"
            costs = dict.fromkeys(["network_backwards", "reward_calls", "reward_gradients", "updates", "budget"], 0)
            costs |= {"network_forwards": nfe or 0, "train_seconds": 0.0}
            named = {"method": f"{label} (judged; training cost {stated})", "run": f"judged-{label}-{one['seed']}"}
            added.append(one | costs | named | {"settings": json.dumps(chosen)})
    folder = tmp_path_factory.mktemp("judged")
    columns = [name for name in frame if name != "schema"]
    rows = [*frame.astype(object).where(frame.notna(), None).to_dict("records"), *added]
    write_rows(folder / "rows.parquet", [{name: none(row[name]) for name in columns} for row in rows])
    found, _ = collect([folder])
    return max((rows for _, rows in settings(found)), key=len), most


def none(value):
    return None if value != value else value


def test_costs_that_are_not_stated_are_unknown(table):
    rows, most = table
    costs = rows[rows["updates"].isna()].groupby("method")[["nfe", "reward_calls", "train_seconds", "updates"]].max()
    assert costs.loc["told (judged; training cost as stated)", "nfe"] == most
    assert costs.loc["untold (judged; training cost unknown)"].isna().all()
    assert costs.drop(columns="nfe").isna().all(axis=None)
    assert rows.loc[rows["method"] == "best_of_n", "updates"].eq(0).all()


def test_equal_cost_takes_only_a_stated_one(table):
    rows, most = table
    told, untold = (
        f"{name} (judged; training cost {cost})" for name, cost in (("told", "as stated"), ("untold", "unknown"))
    )
    chosen, missing, notes = at(rows, "nfe", most)
    assert told in set(chosen["method"]) and untold not in set(chosen["method"])
    assert [one.why for name, one in missing.items() if name.startswith("untold")] == ["training cost unknown"]
    assert "best_of_n" in set(chosen["method"])
    chosen, missing, _ = at(rows, "reward_calls", float(rows["reward_calls"].max()))
    assert not {told, untold} & set(chosen["method"])
    assert len([name for name in missing if "judged" in name]) == 2
    chosen, _, notes = at(rows)
    assert {told, untold} <= set(chosen["method"])
    assert any(told in note and untold in note for note in notes)
    chosen, _, stops = within(rows, "nfe", most)
    assert "judged" not in " ".join(stops["row"])
    assert not (chosen["method"].str.contains("judged") & (chosen["updates"] == 0)).any()


def test_a_board_marks_them(table):
    rows, most = table
    for options in ({}, {"axis": "nfe", "limit": most}):
        board = leaderboard(rows, **options)
        names = [line.name for line in board.lines]
        assert all("judged" in name for name in names if name.startswith(("told", "untold")))
        assert any(name.startswith("told") for name in names)
