"""The priors that ship (see `bench.models.emoji`)."""

from functools import partial

from bench.models.card import EmbeddedCard
from bench.models.emoji import FLOW, WEIGHTS, shared

LICENCE = "Apache-2.0; drawn after Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0) and Fluent Emoji (MIT)"

CARDS = (
    EmbeddedCard(
        "emoji", "the embedded diffusion prior: 32-pixel emoji in three drawing styles", LICENCE, folder=WEIGHTS
    ),
    EmbeddedCard(
        "emoji_flow",
        "the embedded flow-matching prior: the same emoji, in Stable Diffusion 3's layout",
        LICENCE,
        folder=FLOW,
        lender=WEIGHTS,
        components=partial(shared, FLOW),
    ),
)
