"""A learned reward and the judge of its labels, which no training sees."""

from functools import cache

from bench.publish.claims import Claim, Table, markdown_table
from bench.reporting.budgets import KL, TEST
from results.claims.wording import listed, made, name_of

NAME = "preference_200"
JUDGE = "reward/emoji_gold/test"
HEADINGS = ("", "gain of the reward ↑", "gain by the judge ↑", "KL [nats] ↓")


@cache
def _table() -> Table:
    return Table((NAME,))


def _rows() -> list[str]:
    """All rows but the prior's, most gain of the reward first."""
    rows = [row for row in dict.fromkeys(_table().rows["row"]) if row != "prior"]
    return sorted(rows, key=lambda row: -_table().gain(row, TEST).value)


def preference_made() -> Claim:
    return made(_table(), NAME)


def preference_table() -> Claim:
    """On prompts that no training and no tuning saw."""
    reward, judge = (_table().column(metric, gain=True) for metric in (TEST, JUDGE))
    kl = _table().column(KL)
    lines = [(name_of(row), *(cells.get(row, "") for cells in (reward, judge, kl))) for row in _rows()]
    return Claim(markdown_table(HEADINGS, lines), {"some gain": _table().gain(_rows()[0], TEST).low > 0})


def preference_exploited() -> Claim:
    """Who gains of the reward what the judge does not see, or sees as a loss."""
    table = _table()
    gained = [row for row in _rows() if table.gain(row, TEST).low > 0]
    worse = [row for row in gained if table.gain(row, JUDGE).high < 0]
    better = [row for row in gained if table.gain(row, JUDGE).low > 0]
    same = [row for row in gained if row not in (*worse, *better)]

    def said(rows: list[str]) -> str:
        return ", ".join(f"{name_of(row)} ({table.gain(row, JUDGE).signed})" for row in rows)

    kinds = {"finds worse": worse, "finds better": better, "cannot tell from the prior's": same}
    found = "; ".join(f"the judge {kind} those of {said(rows)}" for kind, rows in kinds.items() if rows)
    text = f"The reward on test prompts rises significantly with {listed(gained)}. Of their pictures {found}."
    return Claim(text, {"some gain": bool(gained)})


def preference_turns() -> Claim:
    """Whether the judge had found pictures better at some earlier evaluation than at the end."""
    table = _table()
    lines = []
    for row in table.methods:
        own = table.every[(table.every["row"] == row) & (table.every["metric"] == JUDGE)]
        path = own.groupby("updates")["difference"].mean()
        if len(path):
            lines.append((name_of(row), f"{path.max():+.2f}", f"{path.idxmax():.0f}", f"{path.iloc[-1]:+.2f}"))
    headings = ("", "best mean gain by the judge", "at update", "at the end")
    return Claim(markdown_table(headings, lines), {"there are evaluations": bool(lines)})
