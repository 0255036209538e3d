"""The embedded prior: a small latent text-to-image pipeline, two reward networks, and the recipe that made them.

``path()`` is the folder of shipped weights. It is laid out as diffusers and transformers write such folders, so
``StableDiffusionPipeline.from_pretrained(path())`` and ``CLIPModel.from_pretrained(path() / "clip")`` need no code from
here. ``python -m bench.recipe.train`` makes the weights, ``python -m bench.recipe.evaluate`` measures them.
"""

import json
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
STYLES = ("noto", "twemoji", "fluent")
GUIDANCE = 3.0  # best measured trade of fidelity against variety at 20 steps; see README.md


def path() -> Path:
    """Folder of the shipped weights: the pipeline itself, and below it ``clip/``, ``style/`` and ``concepts.json``."""
    return WEIGHTS


def concepts() -> list[dict]:
    """What the prior can draw: one entry per concept with ``name``, ``names``, ``category`` and ``codepoint``."""
    return json.loads((path() / "concepts.json").read_text(encoding="utf-8"))
