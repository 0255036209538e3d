"""Fit the priors with a known answer, `emoji_mixture` and its flow: ``python -m bench.recipe.mixture``.

A component is one concept in one drawing style on a light or a dark background. It is a Gaussian: mean and principal
directions of the art's latents under small shifts, small changes of size and any background colour of its kind.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from bench.models.emoji import WEIGHTS
from bench.models.emoji_mixture import BACKGROUNDS, FILE
from bench.recipe.art import ART_SIZE, SIZE, load

RANK = 12  # principal directions of a component
FLOOR = 0.2  # standard deviation in the other directions, where the art has 0.1: less, and the last step outweighs all
STYLE_WEIGHTS = (0.4, 0.4, 0.2)  # of STYLES: the one that emoji_style asks for is the rarest
BACKGROUND_WEIGHTS = (0.6, 0.4)  # of BACKGROUNDS
COLOURS = {"light": (0.75, 1.0), "dark": (0.05, 0.55)}  # range of a background's red, green and blue


def pictures(art: Tensor, background: str, count: int, generator: torch.Generator) -> Tensor:
    """`count` images [count, 3, 32, 32] in [0, 1] of one picture [4, 64, 64], uint8 and premultiplied."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / (0.9 + 0.1 * uniform())
    theta[:, :, 2] = 0.08 * (2 * uniform(2) - 1)  # 1.3 pixels: what is further apart is no Gaussian any more
    grid = F.affine_grid(theta, [count, 4, ART_SIZE, ART_SIZE], align_corners=False)
    moved = F.grid_sample(art.expand(count, -1, -1, -1).float() / 255, grid, align_corners=False)
    low, high = COLOURS[background]
    colour = (low + (high - low) * uniform(3))[:, :, None, None]
    return F.avg_pool2d(moved[:, :3] + (1 - moved[:, 3:]) * colour, ART_SIZE // SIZE).clamp(0, 1)


@torch.no_grad()
def fit(art: Tensor, vae: AutoencoderKL, each: int, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of `bench.models.mixture.Mixture` from art [C, style, 4, 64, 64]; `each` images a component."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for picture in track(art.flatten(0, 1), "fitting"):
        for background in BACKGROUNDS:
            images = pictures(picture, background, each, generator)
            latents = vae.encode(2 * images - 1).latent_dist.mean.flatten(1) * vae.config.scaling_factor
            _, singular, directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)
            scales = singular[:RANK] / (each - 1) ** 0.5
            parts.append((latents.mean(0), directions[:RANK].T, scales))
    means, bases, scales = (torch.stack(part).unflatten(0, (len(art), -1)) for part in zip(*parts, strict=True))
    weights = torch.tensor([style * ground for style in STYLE_WEIGHTS for ground in BACKGROUND_WEIGHTS])
    weights = weights.log().expand(len(art), -1).clone()
    return {"log_weights": weights, "means": means, "bases": bases, "scales": scales, "floor": torch.tensor(FLOOR)}


@torch.no_grad()
def text_features(names: list[str]) -> Tensor:
    """What the finetuned part sees of a prompt: the text encoder's pooled state, standardised over prompts [C, 128]."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder", dtype=torch.float32).eval()
    words = tokenizer(names, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = encoder(words).pooler_output
    return (states - states.mean(0)) / states.std(0)


def main(
    cache: Annotated[Path, typer.Option(help="folder of the fetched art")] = Path("runs/emoji"),
    each: Annotated[int, typer.Option(help="images of each component")] = 150,
    out: Annotated[Path, typer.Option(help="file to write")] = FILE,
) -> None:
    """Fit the mixtures to the art behind `emoji` and write them."""
    concepts, art = load(cache)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32).eval()
    tensors = fit(art, vae, each) | {"text": text_features([concept.name for concept in concepts])}
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, out)


if __name__ == "__main__":
    typer.run(main)
