"""The rings: priors of points whose target is known."""

from collections.abc import Callable
from functools import cache, partial

import pandas as pd

from bench.publish.claims import Claim, Estimate, Table, markdown_table, paired, tuning
from bench.reporting.budgets import KL, TRAIN, at
from bench.reporting.statistics import intervals
from results.claims.known_targets import closest, errors, nearest_rows
from results.claims.wording import listed, made, method_of, name_of

SW2, TV, MEAN, SPREAD = "tilt_sw2", "tilt_tv", "tilt_within/mean", "tilt_within/spread"
STEP = "path_kl_steps/"
SHOWN = (
    *("tilt_matching", "rtb", "rtb_softmax", "adjoint_matching", "nabla_gfn_adjoint", "nabla_gfn", "dag_kl"),
    *("nft", "awm", "ddpo", "flow_grpo (ema)", "draft", "draft_1", "refl"),
)
NAMED = 6  # methods that a sentence names


@cache
def _table(name: str) -> Table:
    return Table((name,))


@cache
def _after(name: str, updates: int) -> Table:
    return _table(name).at("updates", updates)


@cache
def _moved(name: str, since: int = 200) -> dict[str, Estimate]:
    """Method → what its distance to the target has changed by since an earlier update, the largest first, if clear."""
    now, then = _table(name), _after(name, since)
    both = [method for method in now.methods if method in then.methods]
    changes = {method: now.since(then, method, SW2) for method in both}
    return {method: one for method, one in sorted(changes.items(), key=lambda pair: -abs(pair[1].value)) if one.clear}


def _moves_away(name: str) -> Claim:
    moved = {method: one for method, one in _moved(name).items() if one.value > 0}
    said = ", ".join(f"{name_of(method)} ({one.signed})" for method, one in list(moved.items())[:NAMED])
    more = f" and {len(moved) - NAMED} more" if len(moved) > NAMED else ""
    who = "1 method moves" if len(moved) == 1 else f"{len(moved)} methods move"
    text = f"From 200 to 400 updates {who} away from the target, by `tilt_sw2`: {said}{more}."
    return Claim(text, {"some do": bool(moved)})


def _approaches(name: str) -> Claim:
    closer = [method for method, one in _moved(name).items() if one.value < 0]
    count = len(_table(name).methods)
    text = f"{len(closer)} of {count} still come closer between 200 and 400 updates: {listed(closer)}."
    return Claim(text, {"some do": bool(closer)})


def _cost(name: str, gain: float) -> Claim:
    """NFE and KL at a gain, the cheapest first; then what is known of methods that pass it between far evaluations."""
    table, every = _table(name).at(TRAIN, gain, measured=True), _table(name).every
    rows = sorted(table.methods, key=lambda row: table(row, "NFE").value)
    nfe, kl, seeds = table.column("NFE"), table.column(KL), table.rows.groupby("row")["seed"].nunique()
    lines = [(name_of(row), nfe[row], kl[row], str(seeds[row])) for row in rows]
    chosen, missing, _ = at(every, TRAIN, gain)
    first = every[every["updates"] > 0].groupby("row")["nfe"].min()
    early = chosen[(chosen["from_prior"] == True) & ~chosen["row"].isin(rows)].groupby("row")["seed"].nunique()  # noqa: E712
    bounds = {row: (f"< {first[row]:,}", str(count)) for row, count in early.items()}
    bounds |= {row: (one.costs["NFE"], str(one.runs)) for row, one in missing.items() if "NFE" in one.costs}
    order = sorted(bounds, key=lambda row: (not bounds[row][0].startswith("<"), first[row]))
    lines += [(name_of(row), bounds[row][0], "–", bounds[row][1]) for row in order]
    return Claim(markdown_table(("", "NFE", "KL [nats]", "seeds"), lines), {"most methods get there": len(rows) > 10})


def _shrunk(name: str) -> Claim:
    table = _table(name)
    off = [row for row in table.methods if table(row, SPREAD).low > table.floor(SPREAD).high]
    worst = sorted(off, key=lambda row: -table(row, SPREAD).value)[:NAMED]
    said = ", ".join(f"{name_of(row)} ({table(row, SPREAD)}, `tilt_tv` {table(row, TV).bare})" for row in worst)
    text = (
        f"The width inside the modes is significantly off for {len(off)} methods, by `tilt_within/spread` most for "
        f"{said}; a value of 0.69 means half or twice the target's width."
    )
    return Claim(text, {"some are": bool(off)})


def _steps(name: str) -> Claim:
    rows = _table(name).rows
    values = rows[rows["metric"].str.startswith(STEP)].pivot_table("value", ["row", "seed"], "metric")
    steps = values.div(values.sum(axis=1), axis=0).groupby("row").mean()
    shares = steps.max(axis=1).dropna().sort_values(ascending=False)
    over = list(shares.index[shares > 0.3])
    if len(over) < len(shares) / 2:
        rest = f"For all methods except {listed(over)}" if over else "For all methods"
        text = f"{rest}, no single step holds more than 30 % of a run's `path_kl` on average"
    else:
        most = steps.loc[over].idxmax(axis=1).mode()[0].removeprefix(STEP)
        text = (
            f"One step holds on average more than 30 % of a run's `path_kl` with {len(over)} of {len(shares)} methods, "
            f"most often step {most} of {steps.shape[1]}"
        )
    return Claim(f"{text}; the largest mean share is {shares.iloc[0]:.0%}.", {"all steps are known": bool(len(shares))})


def _noise(little: str, more: str, noise: str) -> Claim:
    """What more noise in the finished sample changes: both tables, tuned alike."""
    tables = _table(little), _table(more)
    names = ("nabla_gfn", "nabla_gfn_adjoint", "adjoint_matching", "rtb", "tilt_matching", "refl", "draft_1")
    lines = [(name_of(name), *(str(one(name, metric)) for metric in (SW2, KL) for one in tables)) for name in names]
    lines.append(("sampling floor", *(str(one.floor(SW2)) for one in tables), "", ""))
    headings = ("", f"`tilt_sw2` at noise {noise}", "at noise 0.1", f"KL [nats] at noise {noise}", "at noise 0.1")
    return Claim(markdown_table(headings, lines), {})


def _last_step(little: str, more: str, noise: str) -> Claim:
    before, after = _table(little), _table(more)
    rates = [{one["method"]: one["chosen"] for one in tuning(name)["choices"]} for name in (little, more)]
    same = [name for name in after.methods if rates[0][method_of(name)] == rates[1][method_of(name)]]
    names = [name for name in same if before(name, KL).value > 1]
    less = [name for name in names if after(name, KL).high < before(name, KL).low]
    ratios = {name: before(name, KL).value / after(name, KL).value for name in less}
    most = sorted(ratios, key=lambda name: -ratios[name])[:3]
    said = ", ".join(f"{name_of(name)} by a factor of {ratios[name]:.0f}" for name in most)
    text = (
        f"Of {len(names)} methods with the same learning rate in both tables and over a nat at noise of {noise}, "
        f"{len(less)} have significantly less at 0.1, most of all {said}."
    )
    return Claim(text, {"most of them have": len(less) > len(names) / 2})


def _stall(little: str, more: str, noise: str) -> Claim:
    before, after = (_left(_table(name)) for name in (little, more))
    shares = [Estimate(*ends) for ends in intervals([before.to_numpy(), after.to_numpy()], "positive")]
    ratio = paired(after, before, "positive")  # its logarithm, in the same seeds
    apart = "a significant difference" if ratio.clear else "no significant difference"
    text = (
        f"Residual ∇-DB (`nabla_gfn`) ends at {_percent(shares[0])} of the prior's `tilt_sw2` with noise of {noise}, "
        f"and at {_percent(shares[1])} with 0.1: {apart}, paired by seed."
    )
    return Claim(text, {"it is nearer than the prior": shares[0].high < 1})


def _left(table: Table) -> pd.Series:
    """Seed → what is left of the prior's distance with `nabla_gfn`."""
    own = table.rows[(table.rows["row"] == "nabla_gfn") & (table.rows["metric"] == SW2)].set_index("seed")
    return own["value"] / own["prior"]


def _percent(share: Estimate) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def ring_published_stalls() -> Claim:
    ring = _table("ring")
    text = (
        f"With its authors' choices (`nabla_gfn_published`) it stays near the prior at this noise too: "
        f"{ring('nabla_gfn_published', SW2)}, where the prior has {ring.prior(SW2)}."
    )
    left = ring("nabla_gfn_published", SW2).value / ring.prior(SW2).value
    return Claim(text, {"it keeps over four fifths of the prior's distance": left > 0.8})


def ring_adjoint() -> Claim:
    now, then = _table("ring"), _after("ring", 100)
    change = now.since(then, "adjoint_matching", SW2)
    text = (
        f"`adjoint_matching` is at {then('adjoint_matching', SW2)} after 100 updates and at "
        f"{now('adjoint_matching', SW2)} after 400, a change of {change.signed}."
    )
    return Claim(text, {})


def nearest() -> Claim:
    """For a cell of README's table."""
    tables = _table("ring"), _table("ring_flow")
    diffusion, flow = (nearest_rows(table, SW2) for table in tables)
    near = all(table(rows[0], SW2).value < 0.3 for table, rows in zip(tables, (diffusion, flow), strict=True))
    ties = f" ≈ {len(flow) - 1} more" if len(flow) > 1 else ""
    return Claim(f"{listed(diffusion[:3])}; flow: {name_of(flow[0])}{ties}", {"the first are near": near})


def _made(name: str) -> Claim:
    return made(_table(name), name)


def _errors(name: str, metrics: tuple[str, ...]) -> Claim:
    return errors(_table(name), SHOWN, metrics)


def _closest(name: str) -> Claim:
    return closest(_table(name), SW2)


OF_A_TABLE: dict[str, Callable[[], Claim]] = {
    "ring_made": partial(_made, "ring"),
    "ring_table": partial(_errors, "ring", (SW2, TV, MEAN, SPREAD)),
    "ring_closest": partial(_closest, "ring"),
    "ring_moves_away": partial(_moves_away, "ring"),
    "ring_approaches": partial(_approaches, "ring"),
    "ring_cost": partial(_cost, "ring", 0.8),
    "ring_shrunk": partial(_shrunk, "ring"),
    "ring_steps": partial(_steps, "ring"),
    "ring_noise": partial(_noise, "ring_little_noise", "ring", "0.03"),
    "ring_last_step": partial(_last_step, "ring_little_noise", "ring", "0.03"),
    "ring_stall": partial(_stall, "ring_little_noise", "ring", "0.03"),
    "flow_made": partial(_made, "ring_flow"),
    "flow_table": partial(_errors, "ring_flow", (SW2, TV, MEAN, SPREAD)),
    "flow_closest": partial(_closest, "ring_flow"),
    "flow_moves_away": partial(_moves_away, "ring_flow"),
    "flow_approaches": partial(_approaches, "ring_flow"),
    "flow_cost": partial(_cost, "ring_flow", 0.7),
    "flow_shrunk": partial(_shrunk, "ring_flow"),
    "flow_steps": partial(_steps, "ring_flow"),
    "flow_noise": partial(_noise, "ring_flow_little_noise", "ring_flow", "0.02"),
    "flow_last_step": partial(_last_step, "ring_flow_little_noise", "ring_flow", "0.02"),
    "flow_stall": partial(_stall, "ring_flow_little_noise", "ring_flow", "0.02"),
}
