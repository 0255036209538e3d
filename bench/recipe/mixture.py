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
from torchvision.io import write_png
from torchvision.utils import make_grid
from transformers import CLIPTextModel, CLIPTokenizer

from bench import config as configs
from bench.evaluation.draw import draw
from bench.evaluation.features import EfficientNetLite0
from bench.metric import Samples
from bench.models.emoji import WEIGHTS
from bench.models.emoji_mixture import BACKGROUNDS, COMPONENTS, FILE
from bench.models.mixture import EmojiMixture, EmojiMixtureFlow, Mixture
from bench.recipe.art import ART_SIZE, SIZE, load
from bench.recipe.evaluate import Judge, real_images, reconstruct, top
from bench.runs.build import build_core, evaluation_core

SHOWN = ("tiger", "penguin", "butterfly", "octopus", "carrot", "whale")  # prompts of the picture
RANK = 12  # principal directions of a component
FLOOR = 0.2  # standard deviation in the other directions, where the art has 0.1: less, and the last step outweighs all
STYLE_WEIGHTS = (0.4, 0.4, 0.2)  # of bench.models.emoji.STYLES: what emoji_style asks for is the rarest
BACKGROUND_WEIGHTS = (0.6, 0.4)  # of BACKGROUNDS
COLOURS = {"light": (0.75, 1.0), "dark": (0.05, 0.55)}  # range of a background's red, green and blue

CARD = """# Model card: `emoji_mixture` and `emoji_mixture_flow`

<!-- written by `python -m bench.recipe.mixture`: edit the template there, not this page -->

Priors of pictures whose distribution is known: for each of {concepts} prompts, the concepts of
[`emoji`](../emoji/README.md), a mixture of six Gaussians in the latent space of `emoji`'s autoencoder. Density, score
and draws are exact, on the diffusion path and on the flow path. A component is a drawing style on a light or a dark
background: {components}, with weights {weights}.

![Samples of emoji_mixture, below each row those of emoji, for: {prompts}](samples.png)

Each component was fitted to one drawing under shifts of at most 1.3 pixels, sizes of 90 to 100 % and backgrounds of
any colour of its kind: its mean and {rank} principal directions, which hold {held:.0%} of the variance of fresh
pictures. All other directions have the standard deviation {floor:g}. File: {size:.1f} MB (float16).

Measured on {count} samples, 4 of each prompt, with the suites' samplers of 20 steps. The judge is that of `emoji`'s
card: the share of samples whose concept is the first, or among the first five or ten, of {concepts}. The width is
the root mean square of coordinates along the principal directions; 1 is exact, and what is missing is lost by 20 steps,
each of which takes the mean of what may follow. The target of a run is therefore the tilt of what this sampler draws.
Shares are those of the six components.

| model | judge, 1 | judge, 5 | judge, 10 | width | shares |
|---|---|---|---|---|---|
{rows}

The finetuned part is a network of two hidden layers that sees the posterior of component and coordinates, the text
encoder's state of the prompt and the time, and shifts that posterior. `python -m bench.recipe.floor` measures how near
it can come to a target.

The art: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji 3D (MIT). See NOTICE at the repository's root.
"""


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


def explained(art: Tensor, vae: AutoencoderKL, mixture: Mixture, each: int = 40) -> float:
    """Share of the variance of fresh latents around their component's mean that its principal directions hold."""
    generator, inside, total = torch.Generator().manual_seed(1), 0.0, 0.0
    for c, row in enumerate(art[::8]):
        for s, picture in enumerate(row):
            for g, background in enumerate(BACKGROUNDS):
                images = pictures(picture, background, each, generator)
                with torch.no_grad():
                    latents = vae.encode(2 * images - 1).latent_dist.mean.flatten(1) * vae.config.scaling_factor
                apart = latents - mixture.means[8 * c, len(BACKGROUNDS) * s + g]
                inside += float((apart @ mixture.bases[8 * c, len(BACKGROUNDS) * s + g]).square().sum())
                total += float(apart.square().sum())
    return inside / total


def sampled(model: str, prompts: list[str], each: int) -> Samples:
    """Samples of a prior with its suite's sampler, `each` a prompt."""
    config = configs.resolve("prior", overrides={"model.name": model})
    names = [(prompt, i) for prompt in prompts for i in range(each)]
    core = build_core(config)
    return draw(evaluation_core(core, config), names, ["train"] * len(names), seed=0, prior=True)


def judge_of(art: Tensor, vae: AutoencoderKL, features: EfficientNetLite0) -> Judge:
    """The judge of `emoji`'s card: fitted to real art, half of it passed through the autoencoder."""
    known, concept, _ = real_images(art, 4, seed=11)
    return Judge(torch.cat([features(known), features(reconstruct(vae, known))]), concept.repeat(2))


def measure(art: Tensor, names: list[str], vae: AutoencoderKL, pictures_to: Path) -> str:
    """The model card, from samples of every prompt."""
    features = EfficientNetLite0()
    judge, labels = judge_of(art, vae, features), torch.arange(len(names)).repeat_interleave(4)
    rows = []
    for model, kind in {"emoji_mixture": EmojiMixture, "emoji_mixture_flow": EmojiMixtureFlow}.items():
        samples, prior = sampled(model, names, 4), kind()
        assert samples.latents is not None
        posterior = prior.mixture.posterior(samples.latents.flatten(1), labels, torch.ones(()), torch.zeros(()))
        nearest = posterior.log_weights.argmax(1)
        width = posterior.coordinates[torch.arange(len(labels)), nearest].square().mean().sqrt()
        shares = posterior.log_weights.exp().mean(0)
        ranks = top(judge.rank(features(samples.images.float() / 255), labels))
        found = " | ".join(f"{ranks[f'top{k}']:.1%}" for k in (1, 5, 10))
        rows.append(f"| `{model}` | {found} | {float(width):.2f} | {', '.join(f'{share:.0%}' for share in shares)} |")
    strips = [sampled(model, list(SHOWN), 12).images.unflatten(0, (-1, 12)) for model in ("emoji_mixture", "emoji")]
    grid = make_grid(torch.stack(strips, 1).flatten(0, 2), nrow=12, padding=1, pad_value=255)
    write_png(grid.repeat_interleave(2, -1).repeat_interleave(2, -2), str(pictures_to / "samples.png"))
    size = FILE.stat().st_size / 1e6
    held = explained(art, vae, EmojiMixture().mixture)
    weights = ", ".join(f"{s * g:.0%}" for s in STYLE_WEIGHTS for g in BACKGROUND_WEIGHTS)
    return CARD.format(
        concepts=len(names), prompts=", ".join(SHOWN), components="; ".join(COMPONENTS), weights=weights, rank=RANK,
        floor=FLOOR, held=held, size=size, rows="\n".join(rows), count=len(labels),
    )  # fmt: skip


def main(
    cache: Annotated[Path, typer.Option(help="folder of the fetched art")] = Path("runs/emoji"),
    each: Annotated[int, typer.Option(help="images of each component")] = 150,
    fitted: Annotated[bool, typer.Option("--fitted", help="measure what is there, without fitting anew")] = False,
) -> None:
    """Fit the mixtures to the art behind `emoji`, and write them with their model card."""
    concepts, art = load(cache)
    names = [concept.name for concept in concepts]
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32).eval()
    if not fitted:
        tensors = fit(art, vae, each) | {"text": text_features(names)}
        save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, FILE)
    FILE.with_name("README.md").write_text(measure(art, names, vae, FILE.parent), encoding="utf8")


if __name__ == "__main__":
    typer.run(main)
