"""The priors that ship (see `bench.models.emoji`)."""

from functools import partial

from bench.few_step import FewStep
from bench.models.card import EmbeddedCard
from bench.models.emoji import FLOW, GUIDANCE, WEIGHTS, shared, student
from bench.settings import SamplerConfig, Spacing

LICENCE = "Apache-2.0; drawn after Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0) and Fluent Emoji (MIT)"


def _four_steps(teacher: str, spacing: Spacing) -> FewStep:
    sampler = SamplerConfig(steps=20, spacing=spacing, guidance=GUIDANCE)
    return FewStep(steps=(4,), spacing=spacing, teacher=(teacher, sampler))


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
    EmbeddedCard(
        "emoji_turbo",
        "a student of `emoji` with 4 steps and no guidance",
        LICENCE,
        folder=WEIGHTS,
        components=partial(student, WEIGHTS),
        few_step=_four_steps("emoji", "trailing"),
    ),
    EmbeddedCard(
        "emoji_flow_turbo",
        "a student of `emoji_flow` with 4 steps and no guidance",
        LICENCE,
        folder=FLOW,
        lender=WEIGHTS,
        components=partial(student, FLOW),
        few_step=_four_steps("emoji_flow", "shifted"),
    ),
)
