"""Names, lists and numbers in the wordings of claims."""

from collections.abc import Iterable, Sequence

import pandas as pd

from bench.publish.claims import Claim, Table, tuning, untrained


def method_of(row: str) -> str:
    """A row's method."""
    return row.partition(" (")[0]


def name_of(row: str) -> str:
    """The same as code."""
    return f"`{method_of(row)}`"


def listed(rows: Sequence[str]) -> str:
    """ "`a`, `b` and `c`"."""
    names = [name_of(row) for row in rows]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def span(values: Iterable[float], digits: int = 0) -> str:
    """ "3 to 7", or the one number that all are when rounded."""
    every = list(values)
    texts = [f"{value:,.{digits}f}" for value in (min(every), max(every))]
    return " to ".join(dict.fromkeys(texts))


def hours(rows: pd.DataFrame) -> float:
    """What the runs of published rows took."""
    return rows.groupby("run")["wall_seconds"].max().sum() / 3600


def made(table: Table, name: str) -> Claim:
    """Methods, seeds, budget and time of a table, and what its tuning could choose."""
    tuned = tuning(name)
    runs = table.rows[table.rows["updates"] > 0].drop_duplicates("run")
    trained, failed = runs[runs["status"] != "failed"], runs[runs["status"] == "failed"]
    edge = [choice["method"] for choice in tuned["choices"] if choice["edge"]]
    outside = [choice["method"] for choice in tuned["choices"] if not choice["within"]]
    idle = untrained(table.every)
    text = (
        f"{len(table.methods)} methods{f' plus {listed(idle)}' if idle else ''}, {trained['seed'].nunique()} seeds. A "
        f"run has an NFE of {span(trained['nfe'])} in {span(trained['updates'])} updates. {tuned['cost']['runs']} "
        f"trials took {tuned['cost']['wall_seconds'] / 3600:.1f} hours of one CPU thread, "
        f"{table.every['run'].nunique()} runs {hours(table.every):.1f}. Tuning chose the smallest or largest value of "
        f"the grid for {len(edge) or 'none'} of {len(tuned['choices'])} methods"
    )
    if len(failed):
        counts = failed["method"].value_counts()
        runs_of = [f"{count} run{'s' * (count > 1)} of {name_of(name)}" for name, count in counts.items()]
        text += f"; {', '.join(runs_of)} failed"
    if outside:
        text += f"; no rate kept {listed(outside)} within the bound, and they have the one nearest to it"
    return Claim(f"{text}.", {"every method was tuned": len(tuned["choices"]) == len(table.methods)})
