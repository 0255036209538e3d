"""The models that have a name, one card each. A further one is a card in the file of its family, and nothing else."""

from bench.models.card import ModelCard
from bench.models.cards import emoji, flux, qwen_image, sana, sd3, sdxl, stable_diffusion, wan, z_image

FAMILIES = (emoji, stable_diffusion, sdxl, sd3, flux, z_image, qwen_image, sana, wan)
CARDS: dict[str, ModelCard] = {card.name: card for family in FAMILIES for card in family.CARDS}
