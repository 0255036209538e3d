"""The embedded flow prior over all gains: methods as envelopes of learning rates and strengths."""

from functools import cache

import numpy as np

from bench.publish.claims import Claim, Estimate, markdown_table, published, tuning
from bench.reporting.budgets import KL
from bench.reporting.envelopes import Comparison, Group, comparisons, curves, groups, least_kl, over_least, reference
from bench.reporting.frontier import EVERY
from bench.reporting.statistics import CONFIDENCE, holm
from bench.sweeps.choosing import configurations
from results.claims.wording import hours, listed, name_of, span

NAME = "verdict_emoji_flow"
ON = {"test": "the reward on test prompts", "training": "the reward on training prompts"}
ALL = "the reward on all prompts"


@cache
def _groups() -> dict[str, Group]:
    return {group.gained: group for group in groups(published(NAME))}


@cache
def _compared(gained: str) -> dict[str, tuple[Comparison, float]]:
    """Method → its comparison with the `reference`, and p by Holm's method."""
    found = {name: one for name, one in comparisons(_groups()[gained]).items() if one}
    corrected = holm([one.p for one in found.values()])
    return {name: (one, p) for (name, one), p in zip(found.items(), corrected, strict=True)}


def frontiers_made() -> Claim:
    tuned, rows = tuning(NAME), published(NAME)
    runs, seeds = rows["run"].nunique(), rows["seed"].nunique()
    nfe = (rows["network_forwards"] + rows["network_backwards"]).groupby(rows["run"]).max()
    kept = {choice["method"]: len(configurations(choice)) for choice in tuned["choices"]}
    texts = [f"{count} of {name_of(name)}" for name, count in kept.items()]
    edge = [choice["method"] for choice in tuned["choices"] if choice["edge"]]
    return Claim(
        f"{len(kept)} methods, {seeds} seeds. A run has an NFE of {span(nfe)}. {tuned['cost']['runs']} trials took "
        f"{tuned['cost']['wall_seconds'] / 3600:.1f} hours of one CPU thread, {runs} runs of {runs // seeds} "
        f"configurations ({', '.join(texts)}) {hours(rows):.1f}. Tuning chose the smallest or largest "
        f"value of the grid for {len(edge) or 'none'} of {len(kept)} methods.",
        {"every method was tuned": kept.keys() == set(rows["method"]) - {"prior"}},
    )


def frontiers_table() -> Claim:
    """A line per method: KL over the reference's, on both kinds of prompts, and over the least."""
    whole, lines, ratios = _groups()[ALL], [], []
    assert whole.frontier is not None
    best = reference(_groups()[ON["test"]])
    for name in sorted(whole.points, key=lambda name: (name != best, name)):
        cells = []
        for gained in ON.values():
            if name in _compared(gained):
                one, p = _compared(gained)[name]
                mark = "**{}**" if p < 1 - CONFIDENCE else "{}"
                cells.append(f"{_marked(Estimate(*np.exp(one.mean)), mark)} ({_gains(one.gains)})")
            else:
                cells.append("1" if name == reference(_groups()[gained]) else "–")
        least = over_least(whole.points[name], whole.frontier)
        ratios.append(least.low)
        known = np.isfinite(least.value)
        cells.append(f"{Estimate(least.value, least.low, least.high)} ({least.text})" if known else least.text)
        most = curves(_groups()[ON["test"]])[name].iloc[-1]
        cells.append(f"{most['gain']:+.2g} at {Estimate(most['value'], most['low'], most['high'])}")
        lines.append((name_of(name), *cells))
    headings = [
        f"KL over that of {name_of(reference(_groups()[gained]))}, {kind} prompts" for kind, gained in ON.items()
    ]
    headings += ["KL over the least, all prompts", "largest gain that all seeds reach on test prompts, at KL [nats]"]
    return Claim(markdown_table(("", *headings), lines), {"all have more than the least": min(ratios) > 1})


def _marked(estimate: Estimate, mark: str) -> str:
    return f"{mark.format(estimate.bare)} {str(estimate).partition(' ')[2]}".strip()


def _gains(gains: np.ndarray) -> str:
    return f"{gains[0]:.2g}–{gains[-1]:.2g}"


def _said(gained: str) -> str:
    above, tied = ([n for n, (_, p) in _compared(gained).items() if (p < 1 - CONFIDENCE) == sure] for sure in (1, 0))
    parts = [f"{name_of(reference(_groups()[gained]))} has the lowest KL"]
    parts += [f"that of {listed(above)} is significantly higher"] if above else []
    parts += [f"that of {listed(tied)} is not significantly different"] if tied else []
    return "; ".join(parts)


def frontiers_verdict() -> Claim:
    """Who is above the reference on test prompts, and whether training prompts say the same."""
    test, training = map(_said, ON.values())
    same = "The same holds on training prompts." if test == training else f"On training prompts {training}."
    compared = [one for gained in ON.values() for one, _ in _compared(gained).values()]
    known = all(_compared(gained) for gained in ON.values())
    return Claim(
        f"On test prompts {test}. {same}",
        {"somebody is compared on both": known, "none is below": all(one.mean[0] > 0 for one in compared)},
    )


def frontiers_first() -> Claim:
    """Where each method was first measured."""
    points = _groups()[ON["test"]].points
    first = {name: float(np.mean([one[:, 0].min() for one in own.values()])) for name, own in points.items()}
    texts = [f"{name_of(name)} {gain:+.2f}" for name, gain in sorted(first.items(), key=lambda pair: -pair[1])]
    return Claim(
        f"The smallest measured gain on test prompts, mean over seeds: {', '.join(texts)}.",
        {"none is below zero": min(first.values()) > 0},
    )


def frontiers_best() -> Claim:
    """The same for a cell of README's table."""
    points, compared = _groups()[ON["test"]].points, _compared(ON["test"])
    tied = [name for name, (_, p) in compared.items() if p >= 1 - CONFIDENCE]
    text = f"{name_of(reference(_groups()[ON['test']]))}{f' ≈ {len(tied)} more' if tied else ''}; {len(points)} methods"
    return Claim(text, {"somebody is compared": bool(compared)})


def frontiers_selection() -> Claim:
    """What the best of 8 draws of the prior gains, and what as much costs with methods."""
    whole = _groups()[ALL]
    assert whole.frontier is not None
    best = whole.frontier.curve(EVERY, "best_of_n", 8).iloc[0]
    costs = {
        name: [least_kl(one, best[["gain"]].to_numpy(float))[0] for one in own.values()]
        for name, own in whole.points.items()
    }
    reached = {
        name: float(np.exp(np.log(values).mean())) for name, values in costs.items() if np.isfinite(values).all()
    }
    texts = [f"{name_of(name)} ({kl:,.0f} nats)" for name, kl in reached.items()]
    return Claim(
        f"The best of 8 draws of the prior gains {best['gain']:+.1f} on all prompts, at {best['kl']:.1f} nats at most. "
        f"Methods that gain as much in all seeds: {', '.join(texts) or 'none'}.",
        {"their KL is larger": all(kl > best["kl"] for kl in reached.values())},
    )


def frontiers_steps() -> Claim:
    """The largest share that one sampling step has of a run's path_kl."""
    rows = published(NAME)
    last = rows[rows["budget"] == rows.groupby("run")["budget"].transform("max")]
    steps = last[last["metric"].str.startswith(f"{KL}_steps/")]
    shares = steps["value"] / steps.groupby("run")["value"].transform("sum")
    return Claim(
        f"The largest share that one step has of a run's `path_kl` is {100 * shares.max():.0f} %.",
        {"below the 30 % of the protocol": shares.max() < 0.3},
    )


def frontiers_chosen() -> Claim:
    """What was chosen for each method."""
    lines = []
    for choice in tuning(NAME)["choices"]:
        for values, share in zip(configurations(choice), choice["shares"], strict=True):
            texts = ", ".join(f"`{key}` {value:g}" for key, value in values.items())
            lines.append((name_of(choice["method"]), texts, f"{100 * share:.0f} %"))
    return Claim(markdown_table(("", "configuration", "share of the gains"), lines), {"there are choices": bool(lines)})
