"""Wordings about distances to a target that is known."""

from collections.abc import Sequence

from bench.publish.claims import Claim, Table, markdown_table
from bench.reporting.budgets import KL, TRAIN
from results.claims.wording import listed, name_of


def errors(table: Table, methods: Sequence[str], metrics: Sequence[str]) -> Claim:
    """The table of these methods, the nearest first: errors, the best marked, then reward and KL.

    Of these neither more nor less is better where the target is known.
    """
    columns = [table.column(metric) for metric in metrics]
    known = set(table.cells.index)
    columns += [
        {row: str(table(row, metric)) if (row, metric) in known else "–" for row in methods} for metric in (TRAIN, KL)
    ]
    shown = sorted((row for row in methods if row in columns[0]), key=lambda row: table(row, metrics[0]).value)
    lines = [
        ("prior", *(table.prior(metric).bare for metric in (*metrics, TRAIN)), "0"),
        ("sampling floor", *(table.floor(metric).bare for metric in metrics), "", ""),
        *((name_of(row), *(column[row] for column in columns)) for row in shown),
    ]
    headings = ("", *(f"`{metric}` ↓" for metric in metrics), "reward", "KL [nats]")
    return Claim(markdown_table(headings, lines), {"every method shown has values": len(shown) == len(methods)})


def nearest_rows(table: Table, metric: str) -> list[str]:
    """The closest rows and what is not separated from them, by their distance; not what scatters beyond the prior."""
    near = [row for row in table.best(metric) if table(row, metric).value < table.prior(metric).value]
    return sorted(near, key=lambda row: table(row, metric).value)


def closest(table: Table, metric: str) -> Claim:
    """Who comes nearest to the target, beside the floor and the prior."""
    best, *ties = nearest_rows(table, metric)
    behind = f", not significantly different from {listed(ties)}" if ties else ""
    text = (
        f"{name_of(best)} comes closest to the target, with a `{metric}` of {table(best, metric)} at {table(best, KL)} "
        f"nats{behind}; an equally large sample of the target scores {table.floor(metric)}, the prior "
        f"{table.prior(metric)}."
    )
    return Claim(text, {"it is closer than the prior": table.gain(best, metric).high < 0})
