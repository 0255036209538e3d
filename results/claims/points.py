"""The rings: priors of points whose target is known."""

from collections.abc import Iterable
from functools import cache

from bench.publish.claims import Claim, Estimate, Table

SW2, TV, MEAN, SPREAD = "tilt_sw2", "tilt_tv", "tilt_within/mean", "tilt_within/spread"
REWARD, KL, STEP = "reward/train", "path_kl", "path_kl_steps/"
SHOWN = (
    *("tilt_matching", "rtb", "rtb_softmax", "adjoint_matching", "nabla_gfn_adjoint", "nabla_gfn", "dag_kl"),
    *("nft", "awm", "ddpo", "flow_grpo (ema)", "draft", "draft_1", "refl"),
)


@cache
def _table(name: str) -> Table:
    return Table((name,))


@cache
def _after(name: str, updates: int) -> Table:
    return _table(name).at("updates", updates)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _moved(name: str, since: int) -> dict[str, Estimate]:
    """Method → what its distance to the target has changed by since an earlier update, where that is clear."""
    now, then = _table(name), _after(name, since)
    both = [method for method in now.methods if method in then.methods]
    changes = {method: now.since(then, method, SW2) for method in both}
    return {method: one for method, one in sorted(changes.items(), key=lambda pair: -abs(pair[1].value)) if one.clear}


def _shares(table: Table) -> dict[str, float]:
    """Method → the share of path_kl that its largest step holds."""
    steps = table.cells["value"].unstack("metric").filter(like=STEP)
    return (steps.max(axis=1) / steps.sum(axis=1)).dropna().to_dict()


def ring_table() -> Claim:
    ring = _table("ring")
    errors = (SW2, TV, MEAN, SPREAD)
    best = {metric: ring.best(metric) for metric in errors}

    def cell(method: str, metric: str) -> str:
        marked = best.get(metric, [])
        text = f"**{ring(method, metric)}**" if marked[:1] == [method] else str(ring(method, metric))
        return f"{text} ≈" if method in marked[1:] else text

    names = [f"`{name}`" for name in errors]
    lines = [
        ["", *(f"{name} ↓" for name in names), "reward ↑", "KL [nats] ↓"],
        ["---"] * 7,
        ["prior", *(ring.prior(metric).bare for metric in (*errors, REWARD)), "0"],
        ["sampling floor", *(ring.floor(metric).bare for metric in errors), "", ""],
    ]
    shown = sorted((name for name in SHOWN if name in ring.methods), key=lambda name: ring(name, SW2).value)
    lines += [[f"`{name}`", *(cell(name, metric) for metric in (*errors, REWARD, KL))] for name in shown]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Claim(f"\n\n{text}\n\n", {"every method shown has values": len(shown) == len(SHOWN)})


def ring_closest() -> Claim:
    ring = _table("ring")
    best, *ties = ring.best(SW2)
    behind = f", not separated from {_code(ties)}" if ties else ""
    text = (
        f"**Closest to the target** is `{best}`, with a `tilt_sw2` of {ring(best, SW2)} at {ring(best, KL)} nats"
        f"{behind}; as many draws of the target have {ring.floor(SW2)}, the prior {ring.prior(SW2)}."
    )
    return Claim(text, {"it is closer than the prior": ring(best, SW2).high < ring.prior(SW2).value})


def ring_moves_away() -> Claim:
    moved = {name: one for name, one in _moved("ring", 200).items() if one.value > 0}
    listed = ", ".join(f"`{name}` ({one.signed})" for name, one in list(moved.items())[:6])
    more = f" and {len(moved) - 6} more" if len(moved) > 6 else ""
    text = f"**From 200 to 400 updates {len(moved)} methods move away again**, by `tilt_sw2`: {listed}{more}."
    return Claim(text, {"some do": bool(moved)})


def ring_approaches() -> Claim:
    moved = [name for name, one in _moved("ring", 200).items() if one.value < 0]
    count = len(_table("ring").methods)
    text = f"{len(moved)} of {count} trained methods still come closer then: {_code(moved)}."
    return Claim(text, {"some do": bool(moved)})


def ring_shrunk() -> Claim:
    ring = _table("ring")
    worst = sorted(ring.methods, key=lambda name: -ring(name, SPREAD).value)[:4]
    listed = ", ".join(f"`{name}` ({ring(name, SPREAD)}, `tilt_tv` {ring(name, TV).bare})" for name in worst)
    text = (
        f"**Right shares are not right samples.** The width inside the modes is furthest off, by `tilt_within/spread`, "
        f"for {listed}; 0.69 is half or twice the target's width."
    )
    return Claim(
        text, {"their widths are clearly off": all(ring(n, SPREAD).low > ring.floor(SPREAD).high for n in worst)}
    )


def ring_steps() -> Claim:
    shares = _shares(_table("ring"))
    most = sorted(shares, key=lambda name: -shares[name])
    over = [name for name in most if shares[name] > 0.3]
    rest = f"all but {_code(over)}" if over else "all methods"
    text = f"With this noise no step holds more than 30 % of `path_kl` for {rest} (the most is {shares[most[0]]:.0%})."
    return Claim(text, {"most methods keep below": len(over) < len(shares) / 2})


def ring_stall() -> Claim:
    little, more = _table("ring_little_noise"), _table("ring")
    names = ("nabla_gfn", "nabla_gfn_adjoint", "adjoint_matching", "rtb")
    listed = "; ".join(
        f"`{name}` from {little(name, SW2)} to {more(name, SW2)}, of a floor of {more.floor(SW2).bare}"
        for name in names
    )
    closer = [name for name in names if more(name, SW2).high < little(name, SW2).low]
    text = f"With noise of 0.1 instead of 0.03 in the finished sample, `tilt_sw2` after 400 updates falls: {listed}."
    return Claim(text, {"it falls clearly for all of them": len(closer) == len(names)})


def ring_published_stalls() -> Claim:
    ring = _table("ring")
    text = (
        f"Residual ∇-DB with its authors' choices (`nabla_gfn_published`) stays near the prior at this noise too: "
        f"{ring('nabla_gfn_published', SW2)}, where the prior has {ring.prior(SW2)}."
    )
    gone = ring("nabla_gfn_published", SW2).value / ring.prior(SW2).value
    return Claim(text, {"it keeps over four fifths of the prior's distance": gone > 0.8})
