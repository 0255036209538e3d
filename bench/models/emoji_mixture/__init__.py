"""The priors with a known answer: mixtures of Gaussians in the latent space of `emoji`.

``python -m bench.recipe.mixture`` fits them. A component is a drawing style on a light or a dark background.
"""

from pathlib import Path

from bench.models.emoji import STYLES

FILE = Path(__file__).parent / "mixture.safetensors"
BACKGROUNDS = ("light", "dark")
COMPONENTS = tuple(f"{style}, {background}" for style in STYLES for background in BACKGROUNDS)
