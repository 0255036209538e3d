"""How rows of a table look in every figure: a hue per family of methods, a shade and a marker per row."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import seaborn as sns

FAMILIES = {  # what a method learns from; one of another package is among the others
    "reward gradient": "refl draft draft_1 draft_full draft_kl draft_lv alignprop leap_align",
    "policy gradient": "ddpo grpo dpok flow_grpo flow_grpo_cps dance_grpo mix_grpo grpo_guard flow_dppo "
    "tempflow_grpo flash_grpo gardo",
    "gradient matching": "nabla_gfn nabla_gfn_noflow nabla_gfn_published nabla_gfn_adjoint nabla_db "
    "adjoint_matching vgg_flow vgg_flow_pruned value_matching",
    "balance": "rtb rtb_softmax tmpo db res_db dag_kl",
    "regression on samples": "nft awm rvm ram tilt_matching iterative_tilting dgpo crd online_dpo",
}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names.split()}
SHADES = {  # from dark to light, legible on white and on a dark page
    "reward gradient": ("#2342c0", "#2f7de1", "#57d0f0"),
    "policy gradient": ("#8f3a10", "#e0760c", "#f7c948"),
    "gradient matching": ("#166b38", "#2f9e44", "#a9dc4f"),
    "balance": ("#9c1238", "#e03158", "#fb9fb8"),
    "regression on samples": ("#5320b8", "#8b45e6", "#d0aefa"),
    "others": ("#4b5563", "#7c8593", "#b9bec6"),
}
MARKERS = "osD^vPX*<>"


class Look(NamedTuple):
    """Of a row: a colour as "#rrggbb" and a marker of matplotlib."""

    color: str
    marker: str


def family(name: str) -> str:
    """Of a row of a table, whose settings or copies stand behind a bracket."""
    return FAMILY.get(name.split(" (")[0], "others")


def families(order: Sequence[str]) -> dict[str, list[str]]:
    """Family → its rows in the given order; families without rows are left out."""
    members = {kind: [name for name in order if family(name) == kind] for kind in SHADES}
    return {kind: names for kind, names in members.items() if names}


def looks(order: Sequence[str]) -> dict[str, Look]:
    """Row → its look; figures of one table share it if they are given the same rows in the same order."""
    found: dict[str, Look] = {}
    for kind, names in families(order).items():
        shades = sns.blend_palette(SHADES[kind], len(names)).as_hex()
        half = (len(names) + 1) // 2
        apart = [shade for pair in zip_longest(shades[:half], shades[half:]) for shade in pair if shade]  # neighbours
        found |= {name: Look(apart[i], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    return found
