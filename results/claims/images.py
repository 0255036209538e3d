"""The embedded image priors: end of training, path_kl at equal gain, and selection."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import pandas as pd

from bench.publish.claims import Claim, Range, Table, markdown_table, tuning
from bench.reporting.budgets import KL, TRAIN, VALIDATION
from bench.reporting.frontier import best_kl
from results.claims.wording import listed, made, name_of, span

HELDOUT = VALIDATION  # the prompts on whose reward learning rates were chosen
PROMPTS = {TRAIN: "training", HELDOUT: "held-out"}
SPACE = "efficientnet_lite0"
FID, COVERAGE, DIVERSITY = f"fid_prior/{SPACE}", f"coverage/{SPACE}", f"diversity/{SPACE}"
SLOW = " (optimizer.lr = 0.0005)"  # what rows of `emoji_small_rate` are called beside those of `emoji`
FAST = " (optimizer.lr = 0.008)"
MIDDLE = f"{KL}_steps/10"  # of 20
NARROW = 1.1  # a range of gains whose ends differ by less is one gain, and is not compared


class Setting(NamedTuple):
    """A prior and a reward: the published tables, and the rows of DRaFT and ReFL that leave the prior slowest."""

    title: str
    names: tuple[str, ...]
    draft: str
    refl: str = "refl"


SETTINGS = {
    "emoji_flow": Setting("`emoji_flow`, `emoji_style`", ("emoji_flow",), "draft"),
    "colorfulness": Setting("`emoji_flow`, `colorfulness`", ("emoji_flow_colorfulness",), "draft_1"),
    "emoji": Setting("`emoji`, `emoji_style`", ("emoji", "emoji_small_rate"), "draft" + SLOW, "refl" + SLOW),
    "emoji_clip": Setting("`emoji`, `emoji_clip`", ("emoji_clip",), "draft_1"),
}


@cache
def _table(*names: str) -> Table:
    return Table(names)


@cache
def _at(gain: float, *names: str) -> Table:
    """At a gain on training prompts, without methods that pass it before their first evaluation."""
    return _table(*names).at(TRAIN, gain, measured=True)


def _clear(table: Table, methods: Sequence[str], metric: str, sign: int) -> list[str]:
    """The methods at which the paired difference to the prior has this sign and an interval that leaves out zero."""
    found = {name: table.gain(name, metric) for name in methods}
    return [name for name, gain in found.items() if gain.clear and sign * gain.value > 0]


# What the tables cannot say


def rates_at_an_end() -> Claim:
    choices = [choice for one in SETTINGS.values() for choice in tuning(one.names[0])["choices"]]
    edge = sum(bool(choice["edge"]) for choice in choices)
    return Claim(f"{edge} of {len(choices)} chose an end of the grid", {"some did": edge > 0})


def _largest_step(name: str) -> tuple[str, pd.Series]:
    """The sampling step with most of path_kl, and row → its mean share."""
    rows = _table(name).rows
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
        rows = _table(name).rows
        gaps.append(rows.loc[rows["metric"] == f"{FID}/floor", "value"].abs().max())
        images |= set(rows.loc[rows["metric"] == FID, "n"])
    return Claim(
        f"Two sets of {span(sorted(images))} images of the same prior differ by up to {max(gaps):.0f} in `fid_prior`: "
        "smaller differences say nothing.",
        {"the floor is not zero": min(gaps) > 1},
    )


# The end of training


def _end(name: str) -> Claim:
    """A line per method, largest gain first."""
    table = _table(name)
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
    table, methods = _table("emoji"), ["draft", "draft_1", "refl"]
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
    table, methods = _table("emoji", "emoji_small_rate"), ["draft", "refl"]
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
    """Who loses coverage; the others are not separated from the prior."""
    table = _table(name)
    lost = _clear(table, table.methods, COVERAGE, -1)
    others = [row for row in table.methods if row not in lost]
    return Claim(
        f"Coverage is significantly below the prior's {table.prior(COVERAGE).bare} with {listed(lost)}. With "
        f"{listed(others)} {table.every['seed'].nunique()} seeds show no significant difference.",
        {"some lose coverage, and some do not": bool(lost) and bool(others)},
    )


def _unmoved(name: str) -> Claim:
    """Whose gain on training prompts is not separated from zero, or small."""
    table = _table(name)
    most = max(table.gain(row, TRAIN).value for row in table.methods)
    flat = [row for row in table.methods if not table.gain(row, TRAIN).clear]
    little = [row for row in table.methods if row not in flat and table.gain(row, TRAIN).value < most / 5]
    return Claim(
        f"Gains not separated from zero at this budget: {listed(flat)}. Significant gains of less than a fifth of the "
        f"most: {listed(little)}.",
        {"there are both": bool(flat) and bool(little), "none is below zero": not _clear(table, little, TRAIN, -1)},
    )


def emoji_flow_stops() -> Claim:
    table, methods = _table("emoji_flow"), ["draft", "draft_1", "refl"]
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
    table, best = _table("emoji_flow"), _table("emoji_flow").best(TRAIN)
    ratio = table.ratio("adjoint_matching", "refl", KL)
    heldout = table.difference("adjoint_matching", "refl", HELDOUT)
    others = [row for row in best if row != "adjoint_matching"]
    return Claim(
        f"`adjoint_matching` gains {table.gain('adjoint_matching', TRAIN).signed} on training prompts, not separated "
        f"from {listed(others)}, with {ratio} times the KL of `refl`. On held-out prompts it gains less than `refl`: "
        f"{heldout.signed}.",
        {
            "not separated from the best": "adjoint_matching" in best and "refl" in best,
            "less KL than refl": ratio.high < 1,
            "less on held-out prompts": heldout.high < 0,
        },
    )


def emoji_flow_awm() -> Claim:
    table = _at(1.3, "emoji_flow")
    others = [row for row in table.methods if row != "awm"]
    gaps = [table.difference("awm", row, FID) for row in others]
    return Claim(
        f"At a gain of 1.3 `fid_prior` is up by {table.gain('awm', FID).signed} with `awm`, and by at most "
        f"{max(table.gain(row, FID).value for row in others):.0f} with {listed(others)}, though its KL of "
        f"{table('awm', KL)} nats is not separated from that of "
        f"{listed([row for row in others if not table.ratio('awm', row, KL).low > 1])}. In step 10 of 20 `awm` has "
        f"{table('awm', MIDDLE)} nats, the others {span([table(row, MIDDLE).value for row in others], 3)}.",
        {
            "fid_prior is higher than every other's": all(gap.low > 0 for gap in gaps),
            "its KL is like that of draft_1 and refl": all(
                table.ratio("awm", row, KL).low < 1 < table.ratio("awm", row, KL).high for row in ("draft_1", "refl")
            ),
            "more KL in the middle": all(table.ratio("awm", row, MIDDLE).low > 1 for row in others),
        },
    )


def emoji_clip_heldout() -> Claim:
    table = _table("emoji_clip")
    gain = _clear(table, table.methods, HELDOUT, 1)
    texts = [f"{name_of(row)} ({table.gain(row, HELDOUT).signed})" for row in gain]
    others = [row for row in table.methods if row not in gain]
    return Claim(
        f"Of the trained methods {' and '.join(texts)} gain on held-out prompts; the gains of {listed(others)} are "
        "not separated from zero.",
        {"adjoint_matching gains most": gain[0] == "adjoint_matching" and _ahead(table, HELDOUT, gain)},
    )


def _ahead(table: Table, metric: str, rows: Sequence[str]) -> bool:
    """Whether the first of these rows is significantly above all others."""
    return all(table.difference(rows[0], row, metric).low > 0 for row in rows[1:])


def emoji_clip_diversity() -> Claim:
    table = _table("emoji_clip")
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
    table, best = _table("emoji_flow_colorfulness"), _table("emoji_flow_colorfulness").best(TRAIN)
    gain, fid, coverage = (table.gain("adjoint_matching", metric) for metric in (TRAIN, FID, COVERAGE))
    return Claim(
        f"`adjoint_matching` gains most on training prompts, {gain.signed} at {table('adjoint_matching', KL)} nats, "
        f"and its `fid_prior` is up most, by {fid.signed}; coverage changes by {coverage.signed}. On held-out prompts "
        "it is not separated from "
        f"{listed([row for row in table.best(HELDOUT) if row != 'adjoint_matching'])}.",
        {
            "alone best": best == ["adjoint_matching"],
            "coverage falls": coverage.high < 0,
            "largest fid_prior": max(table.methods, key=lambda row: table.gain(row, FID).value) == "adjoint_matching",
            "best on held-out prompts": table.best(HELDOUT)[0] == "adjoint_matching",
        },
    )


def colorfulness_looks() -> Claim:
    table = _at(13, "emoji_flow_colorfulness")
    gap, ratio = table.difference("adjoint_matching", "draft_1", FID), table.ratio("adjoint_matching", "draft_1", KL)
    return Claim(
        f"At a gain of 13 `adjoint_matching` has {ratio} times the KL of `draft_1`, yet `fid_prior` is up by "
        f"{table.gain('adjoint_matching', FID).signed} against {table.gain('draft_1', FID).signed}.",
        {"less KL": ratio.high < 1, "higher fid_prior": gap.low > 0},
    )


# path_kl over all gains that two methods reach


def _range(setting: Setting, first: str, second: str, reward: str) -> Range | None:
    found = _table(*setting.names).over_gains(first, second, reward)
    return found if found and found.high >= NARROW * found.low else None


def _ratio(found: Range | None) -> str:
    if found is None:
        return "–"
    ratio = f"**{found.ratio.bare}**" if not found.ratio.low <= 1 <= found.ratio.high else found.ratio.bare
    return f"{ratio} {str(found.ratio).partition(' ')[2]} ({found.low:.2g}–{found.high:.2g})"


def _compared(key: str) -> Claim:
    """A line per method: its path_kl over DRaFT's, on both kinds of prompts."""
    setting = SETTINGS[key]
    lines = []
    for row in _table(*setting.names).methods:
        cells = [_ratio(_range(setting, row, setting.draft, reward)) for reward in PROMPTS]
        if row != setting.draft and cells != ["–", "–"]:
            lines.append((name_of(row), *cells))
    headings = (f"KL over that of {name_of(setting.draft)}, equal gain on training prompts", "on held-out prompts")
    return Claim(markdown_table(("", *headings), lines), {"somebody is compared": bool(lines)})


def images_kl() -> Claim:
    """A line per setting and kind of prompts."""
    lines = []
    for setting in SETTINGS.values():
        for reward, prompts in PROMPTS.items():
            rows = ("nabla_gfn", "adjoint_matching", setting.refl, "awm", "ddpo")
            cells = [_ratio(_range(setting, row, setting.draft, reward)) for row in rows]
            lines.append((setting.title, prompts, *cells))
    headings = ("prior, reward", "prompts", "`nabla_gfn`", "`adjoint_matching`", "`refl`", "`awm`", "`ddpo`")
    return Claim(markdown_table(headings, lines), {})


class _Tally(NamedTuple):
    """Comparisons of a method with DRaFT and ReFL, by what became of them: settings, prompts and rivals."""

    lower: list[tuple[str, str]]
    higher: list[tuple[str, str]]
    tied: list[tuple[str, str]]
    none: list[tuple[str, str]]

    @property
    def made(self) -> int:
        return len(self.lower) + len(self.higher) + len(self.tied)


def _against(setting: Setting, method: str) -> Iterator[tuple[str, Range | None]]:
    for reward in PROMPTS:
        for rival in (setting.draft, setting.refl):
            yield reward, _range(setting, method, rival, reward)


def _tally(method: str) -> _Tally:
    tally = _Tally([], [], [], [])
    for key, setting in SETTINGS.items():
        for reward, found in _against(setting, method):
            if found is None:
                tally.none.append((key, reward))
            elif found.ratio.high < 1:
                tally.lower.append((key, reward))
            else:
                (tally.higher if found.ratio.low > 1 else tally.tied).append((key, reward))
    return tally


def nabla_gfn_kl() -> Claim:
    tally = _tally("nabla_gfn")
    return Claim(
        f"Not decided: of {tally.made} comparisons of `nabla_gfn` with DRaFT and ReFL at gains on training prompts its "
        f"KL is lower in {len(tally.lower)}, higher in {len(tally.higher)} (with `colorfulness`) and not separated in "
        f"{len(tally.tied)}. On held-out prompts there is no range of gains that all seeds reach between two "
        "evaluations.",
        {
            "higher with colorfulness, and nowhere else": {key for key, _ in tally.higher} == {"colorfulness"},
            "no verdict for all settings": bool(tally.lower) and bool(tally.higher),
            "every setting is compared on training prompts": tally.made == 2 * len(SETTINGS),
            "none is on held-out prompts": {reward for _, reward in tally.none} == {HELDOUT}
            and len(tally.none) == 2 * len(SETTINGS),
        },
    )


def adjoint_kl() -> Claim:
    tally = _tally("adjoint_matching")
    return Claim(
        f"Of {tally.made} comparisons of `adjoint_matching` with DRaFT and ReFL that have a range of gains its KL is "
        f"lower in {len(tally.lower)} and not separated in {len(tally.tied)}; {len(tally.none)} have none.",
        {"never higher": not tally.higher, "lower in most": len(tally.lower) > tally.made / 2},
    )


def least_kl() -> Claim:
    """The same for a cell of README's table."""
    tally = _tally("adjoint_matching")
    return Claim(
        f"`adjoint_matching`: lower in {len(tally.lower)} of {tally.made} cases",
        {"never higher": not tally.higher, "lower in most": len(tally.lower) > tally.made / 2},
    )


def nabla_gfn_below() -> Claim:
    """The same for a cell of README's table."""
    tally = _tally("nabla_gfn")
    return Claim(
        f"lower in {len(tally.lower)} of {tally.made} cases, higher in {len(tally.higher)}",
        {"both happen": bool(tally.lower) and bool(tally.higher)},
    )


# Gain at equal NFE, and selection


def _faster() -> tuple[list[str], list[str], list[str]]:
    """Settings in which nabla_gfn gains more than ddpo at the end, less, and neither."""
    gaps = {key: _table(*one.names).difference("nabla_gfn", "ddpo", TRAIN) for key, one in SETTINGS.items()}
    more, less = ([key for key, gap in gaps.items() if sign * gap.value > 0 and gap.clear] for sign in (1, -1))
    return more, less, [key for key in gaps if key not in more + less]


def nabla_gfn_or_ddpo() -> Claim:
    more, less, neither = _faster()
    titles = " and ".join(SETTINGS[key].title.replace("`, `", "` with `") for key in more)
    ratio = _at(0.9, *SETTINGS["emoji"].names).ratio("nabla_gfn", "ddpo", KL)
    return Claim(
        f"At about the same NFE `nabla_gfn` gains significantly more on training prompts in {len(more)} of "
        f"{len(SETTINGS)} settings ({titles}) and is not separated from `ddpo` in {len(neither)}. At a gain of 0.9 on "
        f"`emoji`, which all seeds of both reach, it has {ratio} times the KL.",
        {"never less": not less, "more somewhere": bool(more), "less KL": ratio.high < 1},
    )


def faster() -> Claim:
    """The same for a cell of README's table."""
    more, less, neither = _faster()
    return Claim(
        f"in {len(more)} of {len(SETTINGS)} settings, not separated in {len(neither)}",
        {"never less": not less, "more somewhere": bool(more)},
    )


def _selection(name: str) -> Claim:
    table = _table(name)
    gaps = {row: table.difference("best_of_n", row, TRAIN) for row in table.methods}
    below = [row for row, gap in gaps.items() if gap.low > 0]
    above = [row for row, gap in gaps.items() if gap.high < 0]
    tied = [row for row in gaps if row not in below + above]
    parts = [f"more than {'any trained method' if len(below) == len(gaps) else listed(below)}"] if below else []
    parts += [f"less than {listed(above)}"] if above else []
    parts += [f"not separated from {listed(tied)}"] if tied else []
    return Claim(
        f"The best of 8 draws gains {table.gain('best_of_n', TRAIN).signed} on training prompts: {', '.join(parts)}. "
        f"`fid_prior` changes by {table.gain('best_of_n', FID).signed}.",
        {"it gains": table.gain("best_of_n", TRAIN).low > 0},
    )


def _outgained() -> tuple[int, int]:
    """Of the trained methods of all settings, how many gain less on training prompts than the best of 8; all."""
    gaps = [
        _table(one.names[0]).difference("best_of_n", row, TRAIN)
        for one in SETTINGS.values()
        for row in _table(one.names[0]).methods
    ]
    return sum(gap.low > 0 for gap in gaps), len(gaps)


def selection() -> Claim:
    less, every = _outgained()
    bound = best_kl(8)
    return Claim(
        f"The best of 8 draws, whose KL is at most {bound:.2f} nats, gains significantly more on training prompts than "
        f"{less} of the {every} trained methods, counted in each of four settings.",
        {"more than half": less > every / 2},
    )


def best_of_eight() -> Claim:
    """The same for a cell of README's table."""
    less, every = _outgained()
    return Claim(f"best of 8 gains more than {less} of {every} methods", {"over half": less > every / 2})


def profile_of_selection() -> Claim:
    """The figure of all settings: the gain as a share of the best method's, run by run."""
    least: dict[str, float] = {}
    for one in SETTINGS.values():
        table = _table(one.names[0])
        best = max(table.gain(row, TRAIN).value for row in [*table.methods, "best_of_n"])
        for row in [*table.methods, "best_of_n"]:
            own = table.rows[(table.rows["row"] == row) & (table.rows["metric"] == TRAIN)]
            least[row] = min(least.get(row, 1.0), own["difference"].min() / best)
    return Claim(
        f"`best_of_n` has {least['best_of_n']:.0%} or more of the best method's mean gain in every run; every trained "
        "method has less than half of it in some run.",
        {
            "best_of_n has half": least["best_of_n"] >= 0.5,
            "no trained method that ran in all settings": all(
                share < 0.5 for row, share in least.items() if row != "best_of_n" and _everywhere(row)
            ),
        },
    )


def _everywhere(row: str) -> bool:
    return all(row in _table(one.names[0]).methods for one in SETTINGS.values())


def _made(name: str) -> Claim:
    return made(_table(name), name)


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
    "emoji_kl": partial(_compared, "emoji"),
    "emoji_clip_kl": partial(_compared, "emoji_clip"),
    "emoji_flow_kl": partial(_compared, "emoji_flow"),
    "colorfulness_kl": partial(_compared, "colorfulness"),
    "emoji_selection": partial(_selection, "emoji"),
    "emoji_clip_selection": partial(_selection, "emoji_clip"),
    "emoji_flow_selection": partial(_selection, "emoji_flow"),
    "colorfulness_selection": partial(_selection, "emoji_flow_colorfulness"),
}
