"""Measure the embedded prior: ``python -m bench.recipe.evaluate``, with ``--write`` for the model card.

The judge of prompt fidelity is fitted on ImageNet features of real art (EfficientNet-Lite0), which no reward uses.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from cleanfid.fid import frechet_distance
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torchvision.utils import make_grid, save_image
from transformers import CLIPModel, ResNetForImageClassification

from bench.cli.options import with_home
from bench.evaluation.features import EfficientNetLite0
from bench.models.emoji import FLOW, GUIDANCE, STYLES, WEIGHTS, shared
from bench.recipe.art import SIZE, augment, load

STEPS = 20
GRID_PROMPTS = (
    "tiger", "penguin", "strawberry", "butterfly", "octopus", "carrot",
    "noto fox", "twemoji fox", "fluent fox", "fruit",
)  # fmt: skip


def discriminant(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of classes ``[C, d]`` and the covariance within them ``[d, d]``, shrunk, of ``features [N, d]``.

    In float64. ``labels [N]`` are the classes, from 0 on.
    """
    features = features.double()
    centres = torch.stack([features[labels == i].mean(0) for i in range(int(labels.max()) + 1)])
    rest = features - centres[labels]
    within = rest.T @ rest / len(rest)
    return centres, within + 0.1 * within.diagonal().mean() * torch.eye(len(within), dtype=torch.float64)


class Judge:
    """Which concept a picture shows: linear discriminant on features of real images (shared, shrunk covariance)."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        """``features [N, d]`` of real images and their concept ``labels [N]``."""
        centres, covariance = discriminant(features, labels)
        self.weight = torch.linalg.solve(covariance, centres.T)
        self.bias = -0.5 * (centres * self.weight.T).sum(1)

    def rank(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How many other concepts the judge prefers to the right one, ``[N]``; 0 is right."""
        scores = features.double() @ self.weight + self.bias
        return (scores > scores.gather(1, labels[:, None])).sum(1)


def open_pipeline(weights: Path, flow: bool) -> DiffusionPipeline:
    """The pipeline in the folder ``weights``, or that of ``emoji_flow``."""
    if flow:
        pipeline = StableDiffusion3Pipeline.from_pretrained(FLOW, torch_dtype=torch.float32, **shared(FLOW))
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: DiffusionPipeline, prompts: list[str], seed: int, guidance: float) -> torch.Tensor:
    """Images ``[len(prompts), 3, 32, 32]`` in [0, 1], by the pipeline's own call, without noise in its steps."""
    generator, images = torch.Generator().manual_seed(seed), []
    settings = {"num_inference_steps": STEPS, "guidance_scale": guidance, "height": SIZE, "width": SIZE}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        settings["max_sequence_length"] = 0  # it was trained without T5
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64]
        images.append(pipeline(batch, generator=generator, output_type="pt", **settings).images.float())
    return torch.cat(images)


def real_images(art: torch.Tensor, each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``each`` fresh augmentations of every picture, with concept and style labels."""
    pictures = torch.arange(art.shape[0] * art.shape[1]).repeat(each)
    images = augment(art.flatten(0, 1)[pictures], torch.Generator().manual_seed(seed))
    return images, pictures // len(STYLES), pictures % len(STYLES)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of two sets of features, in clean-fid's own code."""
    moments = [m for x in (a.double().numpy(), b.double().numpy()) for m in (x.mean(0), np.cov(x, rowvar=False))]
    return float(frechet_distance(*moments))


def measure(weights: Path, cache: Path, each: int, guidance: float, pictures: Path | None, flow: bool) -> dict:
    """Every figure of the model card, from ``each`` samples of each concept's plain name.

    pictures: a folder for them. flow: of ``emoji_flow``, with the reward networks of ``weights``.
    """
    pipeline = open_pipeline(weights, flow)
    clip = CLIPModel.from_pretrained(weights / "clip").float().eval()
    classifier = ResNetForImageClassification.from_pretrained(weights / "style").float().eval()
    concepts, art = load(cache)
    features = EfficientNetLite0()
    names = [concept.name for concept in concepts]

    known, known_concept, _ = real_images(art, 4, seed=11)  # what the judge learns from
    fresh, fresh_concept, fresh_style = real_images(art, 3, seed=12)  # augmentations that nothing was fitted on
    decoded = reconstruct(pipeline.vae, fresh)
    known_features, fresh_features, decoded_features = features(known), features(fresh), features(decoded)
    # half of the judge's lessons have passed the autoencoder, or it would mark softness instead of the concept
    soft = features(reconstruct(pipeline.vae, known))
    judge = Judge(torch.cat([known_features, soft]), known_concept.repeat(2))

    labels = torch.arange(len(names)).repeat(each)
    prompts = [names[i] for i in labels]
    images = sample(pipeline, prompts, seed=13, guidance=guidance)
    sample_features = features(images)
    half = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(14))
    n = min(len(images), len(fresh) // 2)
    result = {
        "concepts": len(names),
        "samples": len(images),
        "known": len(known),
        "guidance": guidance,
        "reconstruction_l1": (decoded - fresh).abs().mean().item(),
        "reconstruction_psnr": (-10 * (decoded - fresh).square().mean(dim=(1, 2, 3)).log10()).mean().item(),
        "styles": dict(zip(STYLES, style_shares(classifier, images), strict=True)),
        "style_accuracy_real": style_accuracy(classifier, fresh, fresh_style),
        "style_accuracy_decoded": style_accuracy(classifier, decoded, fresh_style),
        "style_accuracy_prompted": prompted_style(pipeline, classifier, names, guidance),
        "judge_samples": top(judge.rank(sample_features, labels)),
        "judge_real": top(judge.rank(fresh_features, fresh_concept)),
        "judge_decoded": top(judge.rank(decoded_features, fresh_concept)),
        "clip_samples": top(clip_rank(clip, pipeline.tokenizer, names, images, labels)),
        "clip_real": top(clip_rank(clip, pipeline.tokenizer, names, fresh, fresh_concept)),
        "frechet_n": n,
        "frechet_samples": frechet(sample_features[:n], fresh_features[half[:n]]),
        "frechet_decoded": frechet(decoded_features[half[n : 2 * n]], fresh_features[half[:n]]),
        "frechet_real": frechet(fresh_features[half[n : 2 * n]], fresh_features[half[:n]]),
        "seconds_per_image": seconds_per_image(pipeline, names, guidance),
        "threads": torch.get_num_threads(),
    }
    if pictures is not None:
        draw(pipeline, guidance, images, sample_features, known, known_features, pictures, "-flow" if flow else "")
    return result


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] encoded to the posterior mean and decoded."""
    parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in images.split(128)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def _styles(classifier: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return classifier(2 * images - 1).logits.argmax(1)


def style_shares(classifier: torch.nn.Module, images: torch.Tensor) -> list[float]:
    """Share of each style among ``images``."""
    return F.one_hot(_styles(classifier, images), len(STYLES)).double().mean(0).tolist()


def style_accuracy(classifier: torch.nn.Module, images: torch.Tensor, styles: torch.Tensor) -> float:
    """Share of ``images`` classified as the given ``styles``."""
    return (_styles(classifier, images) == styles).double().mean().item()


def prompted_style(pipeline, classifier: torch.nn.Module, names: list[str], guidance: float) -> float:
    """Share of samples of "<style> <name>" in which the classifier sees that style."""
    styles = torch.arange(len(names)) % len(STYLES)
    images = sample(pipeline, [f"{STYLES[s]} {n}" for s, n in zip(styles, names, strict=True)], 15, guidance)
    return style_accuracy(classifier, images, styles)


@torch.no_grad()
def clip_rank(clip: CLIPModel, tokenizer, names: list[str], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many other names the dual encoder of the ``emoji_clip`` reward prefers to the right one, ``[N]``."""
    words = tokenizer(names, padding="max_length", truncation=True, return_tensors="pt").input_ids
    scores = clip(input_ids=words, pixel_values=2 * images - 1).logits_per_image
    return (scores > scores.gather(1, labels[:, None])).sum(1)


def top(rank: torch.Tensor) -> dict[str, float]:
    """Share of ranks that are first, and within the first five and ten."""
    return {f"top{k}": (rank < k).double().mean().item() for k in (1, 5, 10)}


def seconds_per_image(pipeline, names: list[str], guidance: float) -> float:
    """Wall time of one guided image in a batch of 32, the better of two."""
    times = []
    for seed in range(2):
        start = time.perf_counter()
        sample(pipeline, names[:32], seed, guidance)
        times.append((time.perf_counter() - start) / 32)
    return min(times)


def draw(pipeline, guidance: float, images, sample_features, known, known_features, folder: Path, suffix: str) -> None:
    """``samples.png`` (one row per prompt) and ``neighbours.png`` (24 samples above their nearest training images).

    suffix: of the files' stems.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid = sample(pipeline, [prompt for prompt in GRID_PROMPTS for _ in range(12)], 16, guidance)
    save_image(enlarge(make_grid(grid, nrow=12, padding=1, pad_value=1.0)), folder / f"samples{suffix}.png")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(17))[:24]
    nearest = torch.cdist(sample_features[chosen], known_features).argmin(1)
    rows = torch.stack([images[chosen].view(2, 12, 3, SIZE, SIZE), known[nearest].view(2, 12, 3, SIZE, SIZE)], 1)
    rows = make_grid(rows.flatten(0, 2), nrow=12, padding=1, pad_value=1.0)
    save_image(enlarge(rows), folder / f"neighbours{suffix}.png")


def enlarge(picture: torch.Tensor) -> torch.Tensor:
    """Every pixel of ``picture [..., H, W]`` twice in both directions."""
    return picture.repeat_interleave(2, -1).repeat_interleave(2, -2)


def main(
    weights: Annotated[Path, typer.Option(help="folder of weights to measure")] = WEIGHTS,
    cache: Annotated[Path, typer.Option(help="folder of the fetched art")] = Path("runs/emoji"),
    each: Annotated[int, typer.Option(help="samples of each concept")] = 4,
    guidance: float = GUIDANCE,
    write: Annotated[bool, typer.Option("--write", help="rewrite the model card and its pictures")] = False,
) -> None:
    """Measure both priors, `emoji` and `emoji_flow`, and print the figures as JSON."""
    card = WEIGHTS.with_name("README.md")
    pictures = card.parent if write else None
    figures, of_flow = (measure(weights, cache, each, guidance, pictures, flow) for flow in (False, True))
    typer.echo(json.dumps({"emoji": figures, "emoji_flow": of_flow}, indent=1))
    if write:
        from bench.recipe.card import render

        card.write_text(render(figures, of_flow, weights, GRID_PROMPTS), encoding="utf-8")


if __name__ == "__main__":
    typer.run(with_home(main))
