"""The embedded image priors: the tables of four settings, for the claims about them."""

from functools import cache
from typing import NamedTuple

from bench.publish.claims import Table
from bench.reporting.budgets import TRAIN, VALIDATION

HELDOUT = VALIDATION  # the prompts on whose reward learning rates were chosen
PROMPTS = {TRAIN: "training", HELDOUT: "held-out"}
SPACE = "efficientnet_lite0"
FID, COVERAGE, DIVERSITY = f"fid_prior/{SPACE}", f"coverage/{SPACE}", f"diversity/{SPACE}"
SLOW = " (optimizer.lr = 0.0005)"  # what rows of `emoji_small_rate` are called beside those of `emoji`
FAST = " (optimizer.lr = 0.008)"


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
def table_of(*names: str) -> Table:
    """The published rows of these tables."""
    return Table(names)


@cache
def at_gain(gain: float, *names: str) -> Table:
    """At a gain on training prompts, without methods that pass it before their first evaluation."""
    return table_of(*names).at(TRAIN, gain, measured=True)
