"""The rings: priors of points whose target is known."""

from functools import cache

from bench.publish.claims import Claim, Table

SW2, TV, KL = "tilt_sw2", "tilt_tv", "path_kl"


@cache
def _ring() -> Table:
    return Table(("ring",))


def ring_closest() -> Claim:
    ring = _ring()
    best = ring.best(SW2)
    return Claim(
        f"`tilt_matching` comes closest, {ring('tilt_matching', SW2)}, at {ring('tilt_matching', KL)} nats.",
        {"tilt_matching alone is best": best == ["tilt_matching"]},
    )
