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


def _exploiting() -> list[str]:
    """Rows whose reward rises while the judge's score falls."""
    return [row for row in _rows() if _table().gain(row, TEST).low > 0 and _table().gain(row, JUDGE).high < 0]


def exploited() -> Claim:
    """For a cell of README's table."""
    found = _exploiting()
    text = f"only {listed(found)}, of {len(_table().methods)} trained methods"
    return Claim(text, {"some do": bool(found), "selection does not": "best_of_n" not in found})


def preference_exploited() -> Claim:
    """What the judge says of the pictures of those that raise the reward."""
    table, worse = _table(), _exploiting()
    gained = [row for row in _rows() if table.gain(row, TEST).low > 0]
    better = [row for row in gained if table.gain(row, JUDGE).low > 0]
    same = [row for row in gained if row not in (*worse, *better)]

    def said(rows: list[str]) -> str:
        return ", ".join(f"{name_of(row)} ({table.gain(row, JUDGE).signed})" for row in rows)

    kinds = {"lower": worse, "higher": better, "not significantly different": same}
    found = "; ".join(f"{kind} with {said(rows)}" for kind, rows in kinds.items() if rows)
    text = (
        f"`emoji_preference` rises significantly on test prompts with {listed(gained)}. The score of its judge is "
        f"{found}."
    )
    return Claim(text, {"some are exploited": bool(worse)})
