"""The models that have a name, one card each. A further one is a card in the file of its family, and nothing else."""

from bench.models.cards import emoji, flux, sd3, sdxl, stable_diffusion

CARDS = {card.name: card for module in (emoji, stable_diffusion, sdxl, sd3, flux) for card in module.CARDS}
