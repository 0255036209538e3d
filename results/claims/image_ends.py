"""The embedded image priors at the end of training, and what their tables cannot say."""

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from bench.publish.claims import Claim, Table, markdown_table, significant, tuning
from bench.reporting.budgets import KL, TRAIN
from results.claims.image_settings import (
    COVERAGE,
    DIVERSITY,
    FAST,
    FID,
    HELDOUT,
    PROMPTS,
    SETTINGS,
    SLOW,
    at_gain,
    table_of,
)
from results.claims.wording import listed, made, name_of, span

MIDDLE = f"{KL}_steps/10"  # of 20


def _clear(table: Table, methods: Sequence[str], metric: str, sign: int) -> list[str]:
    """The methods at which the paired difference to the prior has this sign and is significant, as one of a family."""
    found = {name: table.gain(name, metric) for name in methods}
    return [name for name in significant(found) if sign * found[name].value > 0]


# What the tables cannot say


def rates_at_an_end() -> Claim:
    choices = [choice for one in SETTINGS.values() for choice in tuning(one.names[0])["choices"]]
    edge = sum(bool(choice["edge"]) for choice in choices)
    return Claim(
        f"in {edge} of {len(choices)} cases it is the smallest or largest that was offered", {"some did": edge > 0}
    )


def _largest_step(name: str) -> tuple[str, pd.Series]:
    """The sampling step with most of path_kl, and row → its mean share."""
    rows = table_of(name).rows
    steps = rows[rows["metric"].str.startswith("path_kl_steps/")]
    values = steps.pivot_table(index=["row", "seed"], columns="metric", values="value")
    shares = values.div(values.sum(axis=1), axis=0).groupby("row").mean()
    step = shares.mean().idxmax()
    return step.rpartition("/")[2], shares[step]


def one_step_holds_most() -> Claim:
    (step, emoji), (flow_step, flow) = _largest_step("emoji"), _largest_step("emoji_flow")
    return Claim(
        f"On `emoji` step {step} of 20 has {span(100 * emoji)} % of a method's `path_kl`, on `emoji_flow` step "
        f"{flow_step} has {span(100 * flow)} %.",
        {"more than the 30 % of the protocol": emoji.min() > 0.3 and flow.max() > 0.3},
    )


def floor_of_fid() -> Claim:
    gaps, images = [], set()
    for name in ("emoji", "emoji_flow"):
        rows = table_of(name).rows
        deviation = rows.loc[rows["metric"] == f"{FID}/floor"].drop_duplicates("seed")["standard_error"]  # of the sets
        gaps.append(1.96 * (2 * (deviation**2).mean()) ** 0.5)
        images |= set(rows.loc[rows["metric"] == FID, "n"])
    return Claim(
        f"In 95 % of cases two sets of {span(sorted(images))} images of the same prior differ by less than "
        f"{max(gaps):.0f} in `fid_prior`, so smaller differences mean nothing.",
        {"the floor is not zero": min(gaps) > 1},
    )


# The end of training


def _end(name: str) -> Claim:
    """A line per method, largest gain first."""
    table = table_of(name)
    rates = {choice["method"]: choice["chosen"]["optimizer.lr"] for choice in tuning(name)["choices"]}
    columns = [table.column(metric, gain=True) for metric in (TRAIN, HELDOUT, FID, COVERAGE)] + [table.column(KL)]
    rows = sorted(columns[0], key=lambda row: -table.gain(row, TRAIN).value)
    lines = []
    for row in rows:
        rate = rates.get(row.partition(" (")[0])
        lines.append((name_of(row), *(column.get(row, "–") for column in columns), f"{rate:g}" if rate else "–"))
    headings = ("gain on training prompts ↑", "on held-out prompts ↑", "`fid_prior`, change ↓", "coverage, change ↑")
    return Claim(markdown_table(("", *headings, "KL [nats] ↓", "learning rate"), lines), {})


def emoji_reaches_the_maximum() -> Claim:
    table, methods = table_of("emoji"), ["draft", "draft_1", "refl"]
    ends = [abs(table(name, reward).value) for name in methods for reward in PROMPTS]
    kl, fid, coverage = ([table(name, metric).value for name in methods] for metric in (KL, FID, COVERAGE))
    tuned = tuning("emoji")
    rates = [one["chosen"]["optimizer.lr"] for one in tuned["choices"] if one["method"] in methods]
    return Claim(
        f"{listed(methods)} raise the reward to its maximum of 0, on held-out prompts too, at {span(kl)} nats. "
        f"`fid_prior` is up by {span(fid)}, and coverage is {span(coverage, 2)} (prior: "
        f"{table.prior(COVERAGE).bare}). Tuning, which looked at the reward alone, chose the largest rate for them.",
        {
            "the largest rate": set(rates) == {max(tuned["tune"]["grid"]["optimizer.lr"])},
            "at the maximum": max(ends) < 0.05,
            "all three lose coverage": _clear(table, methods, COVERAGE, -1) == methods,
            "no other method gains as much": set(table.best(TRAIN)) <= set(methods),
        },
    )


def emoji_small_rate_keeps_more() -> Claim:
    table, methods = table_of("emoji", "emoji_small_rate"), ["draft", "refl"]
    ratios = [table.ratio(name + SLOW, name + FAST, KL) for name in methods]
    kept = [table.difference(name + SLOW, name + FAST, COVERAGE) for name in methods]
    values = [table(name + SLOW, COVERAGE).bare for name in methods]
    gains = [table.gain(name + SLOW, TRAIN).signed for name in methods]
    return Claim(
        f"At the smallest rate offered, 5e-4, `draft` and `refl` gain {gains[0]} and {gains[1]} with {ratios[0]} and "
        f"{ratios[1]} times the KL that they have at 8e-3, and coverage is {values[0]} and {values[1]}.",
        {
            "less KL at the small rate": all(ratio.high < 1 for ratio in ratios),
            "more coverage at the small rate": all(gap.low > 0 for gap in kept),
        },
    )


def _coverage(name: str) -> Claim:
    """Who loses coverage."""
    table = table_of(name)
    lost = _clear(table, table.methods, COVERAGE, -1)
    others = [row for row in table.methods if row not in lost]
    seeds = table.every["seed"].nunique()
    prior = table.prior(COVERAGE).bare
    if lost:
        text = (
            f"Coverage is significantly below the prior's {prior} with {listed(lost)}. With {listed(others)} {seeds} "
            "seeds show no significant difference."
        )
    else:
        text = f"No method's coverage differs significantly from the prior's {prior}, with {seeds} seeds."
    return Claim(text, {"none gains it": not _clear(table, others, COVERAGE, 1)})


def _unmoved(name: str) -> Claim:
    """Whose gain on training prompts is not separated from zero, or small."""
    table = table_of(name)
    most = max(table.gain(row, TRAIN).value for row in table.methods)
    moved = significant({row: table.gain(row, TRAIN) for row in table.methods})
    flat = [row for row in table.methods if row not in moved]
    little = [row for row in moved if table.gain(row, TRAIN).value < most / 5]
    return Claim(
        f"Gains not significantly different from zero at this budget: {listed(flat)}. Significant gains of less than a "
        f"fifth of the most: {listed(little)}.",
        {"there are both": bool(flat) and bool(little), "none is below zero": not _clear(table, little, TRAIN, -1)},
    )


def emoji_flow_stops() -> Claim:
    table, methods = table_of("emoji_flow"), ["draft", "draft_1", "refl"]
    ratios = [table.ratio(name, "nabla_gfn", KL) for name in methods]
    return Claim(
        f"`nabla_gfn` ends at {table.gain('nabla_gfn', TRAIN).signed} and {table('nabla_gfn', KL)} nats. "
        f"{listed(methods)} end at +{span([table.gain(name, TRAIN).value for name in methods], 1)} and "
        f"{span([table(name, KL).value for name in methods])} nats, with `fid_prior` up by "
        f"{span([table.gain(name, FID).value for name in methods])}.",
        {
            "they gain more": all(table.difference(name, "nabla_gfn", TRAIN).low > 0 for name in methods),
            "they have more KL": all(ratio.low > 1 for ratio in ratios),
            "fid_prior is up": _clear(table, methods, FID, 1) == methods,
        },
    )


def emoji_flow_adjoint() -> Claim:
    table, best = table_of("emoji_flow"), table_of("emoji_flow").best(TRAIN)
    ratio = table.ratio("adjoint_matching", "refl", KL)
    heldout = table.difference("adjoint_matching", "refl", HELDOUT)
    others = [row for row in best if row != "adjoint_matching"]
    return Claim(
        f"`adjoint_matching` gains {table.gain('adjoint_matching', TRAIN).signed} on training prompts, not "
        f"significantly different from {listed(others)}, with {ratio} times the KL of `refl`. On held-out prompts it "
        f"gains less than `refl`: {heldout.signed}.",
        {
            "not separated from the best": "adjoint_matching" in best and "refl" in best,
            "less KL than refl": ratio.high < 1,
            "less on held-out prompts": heldout.high < 0,
        },
    )


def emoji_flow_awm() -> Claim:
    table = at_gain(1.3, "emoji_flow")
    others = [row for row in table.methods if row != "awm"]
    gaps = [table.difference("awm", row, FID) for row in others]
    ratios = {row: table.ratio("awm", row, KL) for row in others}
    return Claim(
        f"At a gain of 1.3 `fid_prior` is up by {table.gain('awm', FID).signed} with `awm`, and by at most "
        f"{max(table.gain(row, FID).value for row in others):.0f} with {listed(others)}, though its KL of "
        f"{table('awm', KL)} nats is not significantly different from that of "
        f"{listed([row for row, ratio in ratios.items() if ratio.low <= 1 <= ratio.high])}. In step 10 of 20 `awm` has "
        f"{table('awm', MIDDLE)} nats, the others {span([table(row, MIDDLE).value for row in others], 3)}.",
        {
            "fid_prior is higher than every other's": all(gap.low > 0 for gap in gaps),
            "its KL is not less than any other's": all(ratio.high >= 1 for ratio in ratios.values()),
            "its KL is like that of draft_1 and refl": all(
                ratios[row].low < 1 < ratios[row].high for row in ("draft_1", "refl")
            ),
            "more KL in the middle": all(table.ratio("awm", row, MIDDLE).low > 1 for row in others),
        },
    )


def emoji_clip_heldout() -> Claim:
    table = table_of("emoji_clip")
    gain = _clear(table, table.methods, HELDOUT, 1)
    texts = [f"{name_of(row)} ({table.gain(row, HELDOUT).signed})" for row in gain]
    others = [row for row in table.methods if row not in gain]
    return Claim(
        f"Of the trained methods {' and '.join(texts)} gain on held-out prompts; the gains of {listed(others)} are "
        "not significantly different from zero.",
        {
            "adjoint_matching gains most": gain[0] == "adjoint_matching" and _ahead(table, HELDOUT, gain),
            "none loses": not _clear(table, others, HELDOUT, -1),
        },
    )


def _ahead(table: Table, metric: str, rows: Sequence[str]) -> bool:
    """Whether the first of these rows is significantly above all others."""
    return all(table.difference(rows[0], row, metric).low > 0 for row in rows[1:])


def emoji_clip_diversity() -> Claim:
    table = table_of("emoji_clip")
    lost = _clear(table, [*table.methods, "best_of_n"], DIVERSITY, -1)
    texts = [f"{name_of(row)} ({table.gain(row, DIVERSITY).signed})" for row in lost]
    return Claim(
        f"Diversity falls significantly with {' and '.join(texts)}, the two that gain on held-out prompts "
        "by more than a fifth of a point.",
        {
            "these two": set(lost) == {"adjoint_matching", "best_of_n"},
            "and only these gain": {
                row for row in [*table.methods, "best_of_n"] if table.gain(row, HELDOUT).value > 0.2
            }
            == set(lost),
        },
    )


def colorfulness_furthest() -> Claim:
    table, best = table_of("emoji_flow_colorfulness"), table_of("emoji_flow_colorfulness").best(TRAIN)
    gain, fid, coverage = (table.gain("adjoint_matching", metric) for metric in (TRAIN, FID, COVERAGE))
    return Claim(
        f"`adjoint_matching` gains most on training prompts, {gain.signed} at {table('adjoint_matching', KL)} nats, "
        f"and its `fid_prior` is up most, by {fid.signed}; coverage changes by {coverage.signed}. On held-out prompts "
        "it is not significantly different from "
        f"{listed([row for row in table.best(HELDOUT) if row != 'adjoint_matching'])}.",
        {
            "alone best": best == ["adjoint_matching"],
            "coverage falls": coverage.high < 0,
            "largest fid_prior": max(table.methods, key=lambda row: table.gain(row, FID).value) == "adjoint_matching",
            "best on held-out prompts": table.best(HELDOUT)[0] == "adjoint_matching",
        },
    )


def colorfulness_looks() -> Claim:
    table = at_gain(13, "emoji_flow_colorfulness")
    gap, ratio = table.difference("adjoint_matching", "draft_1", FID), table.ratio("adjoint_matching", "draft_1", KL)
    return Claim(
        f"At a gain of 13 `adjoint_matching` has {ratio} times the KL of `draft_1`, yet `fid_prior` is up by "
        f"{table.gain('adjoint_matching', FID).signed} against {table.gain('draft_1', FID).signed}.",
        {"less KL": ratio.high < 1, "higher fid_prior": gap.low > 0},
    )


def _made(name: str) -> Claim:
    return made(table_of(name), name)


OF_A_TABLE: dict[str, Callable[[], Claim]] = {
    "emoji_made": partial(_made, "emoji"),
    "emoji_clip_made": partial(_made, "emoji_clip"),
    "emoji_flow_made": partial(_made, "emoji_flow"),
    "colorfulness_made": partial(_made, "emoji_flow_colorfulness"),
    "emoji_end": partial(_end, "emoji"),
    "emoji_clip_end": partial(_end, "emoji_clip"),
    "emoji_flow_end": partial(_end, "emoji_flow"),
    "colorfulness_end": partial(_end, "emoji_flow_colorfulness"),
    "emoji_coverage": partial(_coverage, "emoji"),
    "emoji_flow_coverage": partial(_coverage, "emoji_flow"),
    "emoji_unmoved": partial(_unmoved, "emoji"),
    "emoji_flow_unmoved": partial(_unmoved, "emoji_flow"),
    "colorfulness_unmoved": partial(_unmoved, "emoji_flow_colorfulness"),
}
