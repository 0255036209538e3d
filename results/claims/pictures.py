"""Pictures whose target is known."""

import math
from functools import cache

from bench.publish.claims import Claim, Table, markdown_table, tuning, untrained
from bench.reporting.budgets import KL
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
LONG = "emoji_mixture_long"
RATE = "optimizer.lr"
FAR = 1.0  # nats of KL to the prior
OUTLIER = 10.0  # times the median KL of a method's runs
GONE = 10.0  # nats that a picture is less likely under the prior, from which on the prior does not draw it


@cache
def _whole() -> Table:
    return Table(("emoji_mixture",))


@cache
def _mixture() -> Table:
    """Without methods that train nothing."""
    return Table(("emoji_mixture",), trained=True)


def mixture_made() -> Claim:
    return made(_whole(), "emoji_mixture")


def mixture_times() -> Claim:
    """What training takes: a policy gradient, one reward gradient per trajectory, and three."""
    rows = _mixture().rows
    minutes = rows[rows["updates"] > 0].groupby("row")["train_seconds"].median() / 60
    said = [f"{name_of(row)} {minutes[row]:.1f}" for row in ("ddpo", "draft_1", "nabla_gfn")]
    text = f"Training alone took, in minutes of one thread beside another run: {', '.join(said)}."
    return Claim(text, {"in this order": minutes["ddpo"] < minutes["draft_1"] < minutes["nabla_gfn"]})


def mixture_table() -> Claim:
    """On training prompts, which the objectives name."""
    rows = [*_mixture().methods, *untrained(_whole().every)]
    return errors(_whole(), rows, [f"{name}/{TRAIN}" for name in (DISTANCE, SHARES, PLACE, WIDTH)])


def mixture_closest() -> Claim:
    return closest(_mixture(), f"{DISTANCE}/{TRAIN}")


def mixture_closest_test() -> Claim:
    return closest(_mixture(), f"{DISTANCE}/{TEST}")


def pictures_nearest() -> Claim:
    """For a cell of README's table, on test prompts."""
    table, name = _mixture(), f"{DISTANCE}/{TEST}"
    best, *ties = nearest_rows(table, name)
    text = f"{name_of(best)}{f' ≈ {len(ties)} more' if ties else ''} of {len(table.methods)}"
    return Claim(text, {"the first is nearer than the prior": table.gain(best, name).high < 0})


def selected() -> Claim:
    """The same of selection, beside the nearest trained method."""
    name = f"{DISTANCE}/{TEST}"
    best = min(SELECTION, key=lambda row: _whole()(row, name).value)
    return Claim(f"{name_of(best)} is {_beside_trained(best, name)}", {})


def _beside_trained(row: str, metric: str) -> str:
    nearest = nearest_rows(_mixture(), metric)[0]
    gap = _whole().difference(row, nearest, metric)
    where = "nearer than" if gap.high < 0 else "further than" if gap.low > 0 else "not separated from"
    return f"{where} {name_of(nearest)}"


def mixture_selection() -> Claim:
    """How near selection comes to the target, beside the nearest trained method."""
    parts, conditions = [], {}
    for split in (TRAIN, TEST):
        name = f"{DISTANCE}/{split}"
        said = " and ".join(f"{name_of(row)} {_whole()(row, name)} ({_beside_trained(row, name)})" for row in SELECTION)
        parts.append(f"On {'training' if split == TRAIN else split} prompts {said}.")
        for row in SELECTION:
            conditions[f"{row} is nearer than the prior on {split} prompts"] = _whole().gain(row, name).high < 0
    return Claim(" ".join(parts), conditions)


def mixture_shares() -> Claim:
    """Whose shares of modes are better, and whose worse, than those of doing nothing."""
    table, name = _mixture(), f"{SHARES}/{TRAIN}"
    lost = [row for row in _largest(name) if table.gain(row, name).low > 0]
    better = [row for row in reversed(_largest(name)) if table.gain(row, name).high < 0]

    def said(rows: list[str]) -> str:
        return ", ".join(f"{name_of(row)} ({table(row, name)})" for row in rows)

    text = (
        f"Their error is {table.prior(name)} for the prior and {table.floor(name)} for an equally large sample of the "
        f"target. Significantly smaller: {said(better)}; significantly larger: {said(lost) or 'none'}."
    )
    return Claim(text, {"some method comes nearer": bool(better)})


def mixture_gradients() -> Claim:
    """Whether the reward's gradient helps to move the shares."""
    table, name = _mixture(), f"{SHARES}/{TRAIN}"
    asked = table.rows.groupby("row")["reward_gradients"].max()
    nearest = list(reversed(_largest(name)))
    ours, theirs = ([row for row in nearest if (asked[row] > 0) == with_gradient] for with_gradient in (True, False))
    text = (
        f"Of the {len(ours)} methods that ask for the reward's gradient {name_of(ours[0])} comes nearest in the shares "
        f"({table(ours[0], name)}), of the {len(theirs)} that ask for its values alone {name_of(theirs[0])} "
        f"({table(theirs[0], name)})."
    )
    apart = table.difference(theirs[0], ours[0], name)
    return Claim(text, {"values alone do better": apart.high < 0})


def mixture_fidelity() -> Claim:
    """Whose pictures the prior does not draw."""
    table, name = _mixture(), f"{FIDELITY}/{TRAIN}"
    gone = [row for row in _largest(name) if table(row, name).low > GONE]
    perhaps = [row for row in _largest(name) if row not in gone and table(row, name).high > GONE]
    rest = [row for row in table.methods if row not in (*gone, *perhaps)]

    def said(rows: list[str]) -> str:
        return ", ".join(f"{name_of(row)} ({table(row, name)})" for row in rows)

    parts = [f"significantly more for {said(gone)}"] if gone else []
    parts += [f"not certain for {said(perhaps)}"] if perhaps else []
    parts += [f"less for {listed(rest)}"]
    text = (
        f"How much less likely the prior finds a method's pictures than the target's, on training prompts, against "
        f"{GONE:.0f} nats: {'; '.join(parts)}."
    )
    return Claim(text, {"some are not": bool(rest)})


def mixture_rates() -> Claim:
    """What a learning rate above the chosen one does, in the trials."""
    leaves = {}
    for choice in tuning("emoji_mixture")["choices"]:
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
        f"At the next larger learning rate {len(leaves)} of {len(_mixture().methods)} methods diverge, or end more "
        f"than {FAR:.0f} nat from the prior and further from the target than at the chosen rate (one seed): {said}."
    )
    return Claim(text, {"some do": bool(leaves), "all of them": all(further > 0 for _, further in leaves.values())})


def mixture_outliers() -> Claim:
    """Runs at the chosen learning rate that end much further from the prior than their method's others."""
    found = {}
    for row in _mixture().methods:
        kl = _mixture().by_seed(row, KL).sort_values()
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


def mixture_pictures() -> Claim:
    """What is to be seen in the samples by mode."""
    table = _mixture()
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


def _largest(metric: str) -> list[str]:
    return sorted(_mixture().methods, key=lambda row: -_mixture()(row, metric).value)
