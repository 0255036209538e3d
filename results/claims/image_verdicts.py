"""The embedded image priors: path_kl at equal gain, gain at equal NFE, and selection."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from bench.publish.claims import Claim, Range, markdown_table, significant
from bench.reporting.budgets import KL, TRAIN
from bench.reporting.frontier import best_kl
from results.claims.image_settings import FID, HELDOUT, PROMPTS, SETTINGS, Setting, at_gain, table_of
from results.claims.wording import listed, name_of

NARROW = 1.1  # a range of gains whose ends differ by less is one gain, and is not compared


# path_kl over all gains that two methods reach


def _range(setting: Setting, first: str, second: str, reward: str) -> Range | None:
    found = table_of(*setting.names).over_gains(first, second, reward)
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
    for row in table_of(*setting.names).methods:
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


Case = tuple[str, str, str]  # setting, reward on which the gain is, rival


class _Tally(NamedTuple):
    """Comparisons of a method with DRaFT and ReFL, by what became of them: settings, prompts and rivals.

    They are a family: lower and higher are those that are significant after Holm's correction.
    """

    lower: list[Case]
    higher: list[Case]
    tied: list[Case]
    none: list[Case]

    @property
    def made(self) -> int:
        return len(self.lower) + len(self.higher) + len(self.tied)


def _tally(method: str) -> _Tally:
    found = {
        (key, reward, rival): _range(setting, method, rival, reward)
        for key, setting in SETTINGS.items()
        for reward in PROMPTS
        for rival in (setting.draft, setting.refl)
    }
    ratios = {case: one.ratio for case, one in found.items() if one}
    sure = significant(ratios)
    return _Tally(
        lower=[case for case in sure if ratios[case].value < 1],
        higher=[case for case in sure if ratios[case].value > 1],
        tied=[case for case in ratios if case not in sure],
        none=[case for case in found if case not in ratios],
    )


def nabla_gfn_kl() -> Claim:
    tally = _tally("nabla_gfn")
    return Claim(
        f"Of {tally.made} comparisons of `nabla_gfn` with DRaFT and ReFL at equal gain on training prompts its KL is "
        f"significantly lower in {len(tally.lower) or 'none'}, higher in {len(tally.higher)} (with `colorfulness`) and "
        f"not significantly different in {len(tally.tied)}. On held-out prompts nothing can be compared: the runs "
        "share no range of gains.",
        {
            "higher with colorfulness, and nowhere else": {key for key, *_ in tally.higher} == {"colorfulness"},
            "every setting is compared on training prompts": tally.made == 2 * len(SETTINGS),
            "none is on held-out prompts": {reward for _, reward, _ in tally.none} == {HELDOUT}
            and len(tally.none) == 2 * len(SETTINGS),
        },
    )


def adjoint_kl() -> Claim:
    tally = _tally("adjoint_matching")
    return Claim(
        f"In {tally.made} of {tally.made + len(tally.none)} comparisons with DRaFT and ReFL both methods reach common "
        f"gains: the KL of `adjoint_matching` is significantly lower in {len(tally.lower)} and not significantly "
        f"different in {len(tally.tied)}.",
        {"never higher": not tally.higher, "lower in most": len(tally.lower) > tally.made / 2},
    )


def below() -> Claim:
    """The same for a cell of README's table."""
    tally = _tally("nabla_gfn")
    return Claim(
        f"significantly in {len(tally.lower) or 'none'} of {tally.made} cases; higher in {len(tally.higher)}",
        {"in most it is neither": len(tally.tied) > tally.made / 2},
    )


# Gain at equal NFE, and selection


def _over_ddpo() -> tuple[list[float], list[float]]:
    """What nabla_gfn gains at the end beyond ddpo, a number per setting, and those that are significant."""
    gaps = {key: table_of(*one.names).difference("nabla_gfn", "ddpo", TRAIN) for key, one in SETTINGS.items()}
    return [gap.value for gap in gaps.values()], [gaps[key].value for key in significant(gaps)]


def nabla_gfn_or_ddpo() -> Claim:
    gaps, sure = _over_ddpo()
    table = at_gain(0.9, *SETTINGS["emoji"].names)
    ratio = table.ratio("nabla_gfn", "ddpo", KL)
    seeds = [set(table.by_seed(row, KL).index) for row in ("nabla_gfn", "ddpo")]
    return Claim(
        f"At about the same NFE the mean gain of `nabla_gfn` on training prompts is larger in "
        f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} settings, significantly in {len(sure) or 'none'}. At a gain of "
        f"0.9 on `emoji`, which all seeds of both reach, it has {ratio} times the KL.",
        {
            "never significantly less": all(gap > 0 for gap in sure),
            "less KL": ratio.high < 1,
            "all seeds reach it": seeds[0] == seeds[1] == set(table.every["seed"]),
        },
    )


def faster() -> Claim:
    """The same for a cell of README's table."""
    gaps, sure = _over_ddpo()
    return Claim(
        f"significantly in {len(sure) or 'none'} of {len(gaps)} settings",
        {"never significantly less": all(gap > 0 for gap in sure)},
    )


def _selection(name: str) -> Claim:
    table = table_of(name)
    gaps = {row: table.difference("best_of_n", row, TRAIN) for row in table.methods}
    sure = significant(gaps)
    below, above = ([row for row in sure if sign * gaps[row].value > 0] for sign in (1, -1))
    tied = [row for row in gaps if row not in below + above]
    parts = [f"more than {'any trained method' if len(below) == len(gaps) else listed(below)}"] if below else []
    parts += [f"less than {listed(above)}"] if above else []
    parts += [f"not significantly different from {listed(tied)}"] if tied else []
    return Claim(
        f"The best of 8 draws gains {table.gain('best_of_n', TRAIN).signed} on training prompts: {', '.join(parts)}. "
        f"`fid_prior` changes by {table.gain('best_of_n', FID).signed}.",
        {"it gains": table.gain("best_of_n", TRAIN).low > 0},
    )


def _outgained() -> tuple[int, int]:
    """Of the trained methods of all settings, how many gain less on training prompts than the best of 8; all."""
    gaps = {
        (key, row): table_of(one.names[0]).difference("best_of_n", row, TRAIN)
        for key, one in SETTINGS.items()
        for row in table_of(one.names[0]).methods
    }
    return sum(gaps[case].value > 0 for case in significant(gaps)), len(gaps)


def selection() -> Claim:
    less, every = _outgained()
    bound = best_kl(8)
    return Claim(
        f"The best of 8 draws, whose KL is at most {bound:.2f} nats, gains significantly more on training prompts than "
        f"trained methods do in {less} of {every} cases (a method in one of four settings).",
        {"more than half": less > every / 2},
    )


def best_of_eight() -> Claim:
    """The same for a cell of README's table."""
    less, every = _outgained()
    return Claim(f"significantly in {less} of {every} cases", {"over half": less > every / 2})


def profile_of_selection() -> Claim:
    """The figure of all settings: the gain as a share of the best method's, run by run."""
    least: dict[str, float] = {}
    for one in SETTINGS.values():
        table = table_of(one.names[0])
        best = max(table.gain(row, TRAIN).value for row in [*table.methods, "best_of_n"])
        for row in [*table.methods, "best_of_n"]:
            own = table.rows[(table.rows["row"] == row) & (table.rows["metric"] == TRAIN)]
            least[row] = min(least.get(row, 1.0), own["difference"].min() / best)
    return Claim(
        f"`best_of_n` has {least['best_of_n']:.0%} or more of the best method's mean gain in every run; every trained "
        "method that ran in all settings has less than half of it in some run.",
        {
            "best_of_n has half": least["best_of_n"] >= 0.5,
            "no trained method that ran in all settings": all(
                share < 0.5 for row, share in least.items() if row != "best_of_n" and _everywhere(row)
            ),
        },
    )


def _everywhere(row: str) -> bool:
    return all(row in table_of(one.names[0]).methods for one in SETTINGS.values())


OF_A_TABLE: dict[str, Callable[[], Claim]] = {
    "emoji_kl": partial(_compared, "emoji"),
    "emoji_clip_kl": partial(_compared, "emoji_clip"),
    "emoji_flow_kl": partial(_compared, "emoji_flow"),
    "colorfulness_kl": partial(_compared, "colorfulness"),
    "emoji_selection": partial(_selection, "emoji"),
    "emoji_clip_selection": partial(_selection, "emoji_clip"),
    "emoji_flow_selection": partial(_selection, "emoji_flow"),
    "colorfulness_selection": partial(_selection, "emoji_flow_colorfulness"),
}
