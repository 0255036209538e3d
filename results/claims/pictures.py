"""Pictures whose target is known."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from bench.publish.claims import Claim, Table, markdown_table, significant, tuning, untrained
from bench.reporting.budgets import KL
from bench.reporting.frontier import find
from results.claims.known_targets import closest, errors, nearest_rows
from results.claims.wording import listed, made, name_of, span

DISTANCE, SHARES, PLACE, WIDTH, FIDELITY = (
    "target_sw2",
    "share_tv",
    "within_mode/mean",
    "within_mode/spread",
    "prior_nll",
)
TRAIN, TEST = "train", "test"
SELECTION = ("soft_best_of_n", "fk_steering")  # both aim at the target
MIXTURE, FLOW, LONG = "emoji_mixture", "emoji_mixture_flow", "emoji_mixture_long"
COLORFULNESS = "emoji_mixture_colorfulness"
RATE = "optimizer.lr"
FAR = 1.0  # nats of KL to the prior
OUTLIER = 10.0  # times the median KL of a method's runs
GONE = 10.0  # nats that a picture is less likely under the prior, from which on the prior does not draw it


@cache
def _whole(name: str) -> Table:
    return Table((name,))


@cache
def _trained(name: str) -> Table:
    """Without methods that train nothing."""
    return Table((name,), trained=True)


def _made(name: str) -> Claim:
    return made(_whole(name), name)


def mixture_times() -> Claim:
    """What training takes: a policy gradient, one reward gradient per trajectory, and three."""
    rows = _trained(MIXTURE).rows
    minutes = rows[rows["updates"] > 0].groupby("row")["train_seconds"].median() / 60
    said = [f"{name_of(row)} {minutes[row]:.1f}" for row in ("ddpo", "draft_1", "nabla_gfn")]
    text = f"Training alone took, in minutes of one thread beside another run: {', '.join(said)}."
    return Claim(text, {"in this order": minutes["ddpo"] < minutes["draft_1"] < minutes["nabla_gfn"]})


def _errors(name: str) -> Claim:
    """On training prompts, which the objectives name."""
    rows = [*_trained(name).methods, *untrained(_whole(name).every)]
    return errors(_whole(name), rows, [f"{metric}/{TRAIN}" for metric in (DISTANCE, SHARES, PLACE, WIDTH)])


def _closest(name: str, split: str) -> Claim:
    return closest(_trained(name), f"{DISTANCE}/{split}")


def pictures() -> Claim:
    """For a cell of README's table, on test prompts."""
    metric, parts, conditions = f"{DISTANCE}/{TEST}", [], {}
    for name in (MIXTURE, FLOW):
        table = _trained(name)
        best, *ties = nearest_rows(table, metric)
        parts.append(f"{name_of(best)}{f' ≈ {len(ties)} more' if ties else ''} of {len(table.methods)}")
        conditions[f"the first is nearer than the prior in {name}"] = table.gain(best, metric).high < 0
    return Claim("; flow: ".join(parts), conditions)


def selected() -> Claim:
    """The same of selection, beside the nearest trained method."""
    metric, parts = f"{DISTANCE}/{TEST}", []
    for name in (MIXTURE, FLOW):
        best = min(SELECTION, key=lambda row: _whole(name)(row, metric).value)
        parts.append(f"{name_of(best)} is {_beside_trained(name, best, metric)}")
    first, flow = parts
    return Claim(f"{first}, on both paths" if flow == first else f"{first}; flow: {flow}", {})


def _beside_trained(name: str, row: str, metric: str) -> str:
    nearest = nearest_rows(_trained(name), metric)[0]
    gap = _whole(name).difference(row, nearest, metric)
    where = "closer than" if gap.high < 0 else "farther than" if gap.low > 0 else "not significantly different from"
    return f"{where} {name_of(nearest)}"


def _selection(name: str) -> Claim:
    """How near selection comes to the target, beside the nearest trained method."""
    table, parts, conditions = _whole(name), [], {}
    for split in (TRAIN, TEST):
        metric = f"{DISTANCE}/{split}"
        said = [f"{name_of(row)} {table(row, metric)} ({_beside_trained(name, row, metric)})" for row in SELECTION]
        parts.append(f"On {'training' if split == TRAIN else split} prompts {' and '.join(said)}.")
        for row in SELECTION:
            conditions[f"{row} is nearer than the prior on {split} prompts"] = table.gain(row, metric).high < 0
    return Claim(" ".join(parts), conditions)


def _shares(name: str) -> Claim:
    """Whose shares of modes are better, and whose worse, than those of doing nothing."""
    table, metric = _trained(name), f"{SHARES}/{TRAIN}"
    sure = significant({row: table.gain(row, metric) for row in _furthest(table, metric)})
    lost = [row for row in sure if table.gain(row, metric).value > 0]
    better = [row for row in reversed(sure) if table.gain(row, metric).value < 0]

    def said(rows: Sequence[str]) -> str:
        return ", ".join(f"{name_of(row)} ({table(row, metric)})" for row in rows)

    text = (
        f"Their error is {table.prior(metric)} for the prior and {table.floor(metric)} for an equally large sample of "
        f"the target. Significantly smaller: {said(better)}; significantly larger: {said(lost) or 'none'}."
    )
    return Claim(text, {"some method comes nearer": bool(better)})


def mixture_gradients() -> Claim:
    """Whether the reward's gradient helps to move the shares."""
    table, metric = _trained(MIXTURE), f"{SHARES}/{TRAIN}"
    asked = table.rows.groupby("row")["reward_gradients"].max()
    nearest = list(reversed(_furthest(table, metric)))
    ours, theirs = ([row for row in nearest if (asked[row] > 0) == with_gradient] for with_gradient in (True, False))
    text = (
        f"Of the {len(ours)} methods that ask for the reward's gradient {name_of(ours[0])} comes nearest in the shares "
        f"({table(ours[0], metric)}), of the {len(theirs)} that ask for its values alone {name_of(theirs[0])} "
        f"({table(theirs[0], metric)})."
    )
    apart = table.difference(theirs[0], ours[0], metric)
    return Claim(text, {"values alone do better": apart.high < 0})


def _fidelity(name: str) -> Claim:
    """Whose pictures the prior does not draw."""
    table, metric = _trained(name), f"{FIDELITY}/{TRAIN}"
    gone = [row for row in _furthest(table, metric) if table(row, metric).low > GONE]
    perhaps = [row for row in _furthest(table, metric) if row not in gone and table(row, metric).high > GONE]
    rest = [row for row in table.methods if row not in (*gone, *perhaps)]

    def said(rows: Sequence[str]) -> str:
        return ", ".join(f"{name_of(row)} ({table(row, metric)})" for row in rows)

    parts = [f"significantly above {GONE:.0f} nats for {said(gone)}"] if gone else []
    parts += [f"not significantly different from {GONE:.0f} nats for {said(perhaps)}"] if perhaps else []
    parts += [f"below {GONE:.0f} nats for {listed(rest)}"]
    text = (
        f"`{FIDELITY}` says how much less likely the prior finds a method's pictures than samples of the target. On "
        f"training prompts it is {'; '.join(parts)}."
    )
    return Claim(text, {"some are not": bool(rest)})


def _rates(name: str) -> Claim:
    """What a learning rate above the chosen one does, in the trials."""
    leaves = {}
    for choice in tuning(name)["choices"]:
        trials = sorted(choice["trials"], key=lambda trial: trial["values"][RATE])
        (place,) = (i for i, trial in enumerate(trials) if trial["values"] == choice["chosen"])
        for chosen, larger in [trials[place : place + 2]] if place + 1 < len(trials) else []:
            if "failed" in larger:
                leaves[choice["method"]] = math.inf, math.inf
            elif larger["path_kl"] > FAR:
                further = larger[f"{DISTANCE}/validation"] - chosen[f"{DISTANCE}/validation"]
                leaves[choice["method"]] = larger["path_kl"], further
    texts = {row: f"{kl:.1f} nats" if math.isfinite(kl) else "diverges" for row, (kl, _) in leaves.items()}
    said = ", ".join(f"{name_of(row)} ({text})" for row, text in texts.items())
    text = (
        f"At the next larger learning rate {len(leaves)} of {len(_trained(name).methods)} methods diverge, or end more "
        f"than {FAR:.0f} nat from the prior and further from the target than at the chosen rate (one seed): {said}."
    )
    return Claim(text, {"some do": bool(leaves), "all of them": all(further > 0 for _, further in leaves.values())})


def _outliers(name: str) -> Claim:
    """Runs at the chosen learning rate that end much further from the prior than their method's others."""
    table, found = _trained(name), {}
    for row in table.methods:
        kl = table.by_seed(row, KL).sort_values()
        if kl.iloc[-1] > OUTLIER * kl.median():
            found[row] = kl.iloc[-1], kl.iloc[:-1]
    texts = [
        f"one run of {name_of(row)} ends at {far:.2g} nats (the others at {span(rest, 2)})"
        for row, (far, rest) in found.items()
    ]
    return Claim(f"At the chosen rate {' and '.join(texts)}.", {"there are some": bool(found)})


def mixture_long() -> Claim:
    """What more updates change, on training and on test prompts."""
    (first, early), (last, late) = _first_and_last()
    lines = [
        (name_of(row), f"`{name}`", str(early(row, name)), str(late(row, name)), late.since(early, row, name).signed)
        for row in late.methods
        for name in (f"{DISTANCE}/{TRAIN}", f"{DISTANCE}/{TEST}", f"{SHARES}/{TRAIN}", f"{SHARES}/{TEST}", KL)
    ]
    headings = ("", "", f"after {first} updates", f"after {last}", "change")
    return Claim(markdown_table(headings, lines), {"more updates": last > first})


def mixture_later() -> Claim:
    """The same in a sentence."""
    (first, early), (last, late) = _first_and_last()
    changes = {
        f"`{name}/{split}` of {name_of(row)}": late.since(early, row, f"{name}/{split}")
        for row in late.methods
        for name in (DISTANCE, SHARES)
        for split in (TRAIN, TEST)
    }
    said = ", ".join(f"{what} ({change.signed})" for what, change in changes.items() if change.clear)
    seeds = late.rows["seed"].nunique()
    text = (
        f"From {first} to {last} updates, with {seeds} seeds, the significant changes of `{DISTANCE}` and `{SHARES}` "
        f"are: {said or 'none'}."
    )
    return Claim(text, {"there are two methods": len(late.methods) == 2})


def _first_and_last() -> tuple[tuple[int, Table], tuple[int, Table]]:
    """The longer runs at their first evaluation and at their end, each with its number of updates."""
    late = Table((LONG,))
    counts = late.every.loc[late.every["updates"] > 0, "updates"]
    first, last = int(counts.min()), int(counts.max())
    return (first, late.at("updates", first)), (last, late)


def mixture_colorfulness_reached() -> Claim:
    """How far the target of the other reward is, and how far methods come."""
    table, metric = _whole(COLORFULNESS), f"{DISTANCE}/{TRAIN}"
    frontier = find(table.every)
    assert frontier is not None
    curve = frontier.curve(TRAIN)
    beta = float(table.every["beta"].iloc[0])
    gain, kl = (float(np.interp(beta, curve["beta"], curve[column])) for column in ("gain", "kl"))
    gains = [table.gain(row, f"reward/{TRAIN}").value for row in table.methods]
    changes = {row: table.gain(row, metric) for row in ("soft_best_of_n", *table.methods)}
    sure = significant(changes)
    said = ", ".join(f"{name_of(row)} {change.signed}{'*' * (row in sure)}" for row, change in changes.items())
    furthest = max(table(row, KL).value for row in table.methods)
    text = (
        f"The target's mean reward is {gain:.0f} above the prior's, at {kl:.2f} nats. Trained methods gain "
        f"{span(gains, 1)} at up to {furthest:.2f} nats: in 100 updates, at the learning rates that tuning chose, less "
        f"than a fifth of the way. `soft_best_of_n` gains {table.gain('soft_best_of_n', f'reward/{TRAIN}').signed}. "
        f"Changes of `{metric}` (*: significant): {said}."
    )
    return Claim(
        text,
        {
            "nobody is significantly farther": all(changes[row].value < 0 for row in sure),
            "less than a fifth": max(gains) < gain / 5,
        },
    )


def mixture_colorfulness_trials() -> Claim:
    """What each learning rate does on validation prompts."""
    trials = {choice["method"]: choice["trials"] for choice in tuning(COLORFULNESS)["choices"]}
    rates = sorted({trial["values"][RATE] for own in trials.values() for trial in own})
    lines = []
    for method, own in trials.items():
        by_rate = {trial["values"][RATE]: trial for trial in own}
        cells = [f"{by_rate[rate][f'{DISTANCE}/validation']:.3f} at {by_rate[rate][KL]:.3g}" for rate in rates]
        lines.append((name_of(method), *cells))
    headings = ("", *(f"learning rate {rate:g}" for rate in rates))
    return Claim(
        markdown_table(headings, lines), {"none failed": not any("failed" in t for o in trials.values() for t in o)}
    )


def mixture_pictures() -> Claim:
    """What is to be seen in the samples by mode."""
    table = _trained(MIXTURE)
    text = (
        "`ddpo` gains most reward, and its modes have moved: they lie further from the target's than the prior's do. "
        "`rtb_softmax` moves the shares; its error of place inside the modes does not differ significantly from the "
        "prior's."
    )
    share, place = f"{SHARES}/{TRAIN}", f"{PLACE}/{TRAIN}"
    gains = {row: table.gain(row, f"reward/{TRAIN}").value for row in table.methods}
    return Claim(
        text,
        {
            "ddpo gains most": max(gains, key=lambda row: gains[row]) == "ddpo",
            "and its places are worse than the prior's": table.gain("ddpo", place).low > 0,
            "rtb_softmax has other shares and the prior's places": table.gain("rtb_softmax", share).high < 0
            and not table.gain("rtb_softmax", place).clear,
        },
    )


def _furthest(table: Table, metric: str) -> list[str]:
    """The methods, the largest value first."""
    return sorted(table.methods, key=lambda row: -table(row, metric).value)


_SUFFIXES: dict[str, Callable[[str], Claim]] = {
    "made": _made,
    "table": _errors,
    "closest": partial(_closest, split=TRAIN),
    "closest_test": partial(_closest, split=TEST),
    "selection": _selection,
    "shares": _shares,
    "fidelity": _fidelity,
    "rates": _rates,
    "outliers": _outliers,
}
OF_A_TABLE: dict[str, Callable[[], Claim]] = {
    **{
        f"{prefix}_{suffix}": partial(claim, name)
        for prefix, name in {"mixture": MIXTURE, "mixture_flow": FLOW}.items()
        for suffix, claim in _SUFFIXES.items()
    },
    "mixture_colorfulness_made": partial(_made, COLORFULNESS),
    "mixture_colorfulness_table": partial(_errors, COLORFULNESS),
}
