"""Few-step students of the embedded priors: ``python -m bench.recipe.distil emoji_flow`` (or ``emoji``).

The student is its teacher with an adapter. It learns the teacher's own deterministic, guided path: from the state at
one of its few levels it steps to the teacher's state at the next, which takes the teacher several steps (trajectory
distillation). So it needs no guidance. Nothing is fetched: the paths begin with noise and the recipe's captions.

Stages: ``paths`` (the teacher's states, cached by parts), ``fit``, ``export``. A killed run continues.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from bench.cli.options import with_home
from bench.model import Conditioning
from bench.models.catalogue import load_model, make_kernel
from bench.models.emoji import GUIDANCE, STYLES, concepts
from bench.models.pipeline import LORA_FILE, PipelineModel
from bench.recipe.art import Concept, caption
from bench.recipe.loop import Recipe, fit
from bench.sampling.kernel import Kernel, mean_square
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

STEPS, TEACHER_STEPS = 4, 20
PART = 64  # paths in a file of the cache, and in a batch
LINEAR = r"(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|linear|linear_[12]|net\.0\.proj|net\.2|proj_out)"
CONVOLUTION = r"(conv|conv[12]|conv_in|conv_out|conv_shortcut|time_emb_proj|proj_in)"


@dataclass(frozen=True)
class Student:
    """sampler: the teacher's, without noise; a grid of a fifth of its steps is part of it. lora: of the student."""

    sampler: SamplerConfig
    lora: LoraConfig


STUDENTS = {
    "emoji_flow": Student(
        SamplerConfig(steps=TEACHER_STEPS, eta=0, guidance=GUIDANCE, spacing="shifted", final_noise=0),
        LoraConfig(rank=28, target_modules=rf"(.*\.)?({LINEAR}|context_embedder)"),
    ),
    "emoji": Student(
        SamplerConfig(steps=TEACHER_STEPS, eta=0, guidance=GUIDANCE, spacing="trailing"),
        LoraConfig(rank=28, target_modules=rf"(.*\.)?({LINEAR}|{CONVOLUTION})"),
    ),
}


def captions(seed: int) -> Iterator[str]:
    """Random captions of random concepts, without end."""
    rng = np.random.default_rng(seed)
    known = [Concept(**entry | {"names": tuple(entry["names"])}) for entry in concepts()]
    while True:
        yield caption(known[rng.integers(len(known))], STYLES[rng.integers(len(STYLES))], rng)


@torch.no_grad()
def make_paths(recipe: Recipe, name: str, count: int) -> tuple[list[str], torch.Tensor]:
    """Captions, and the teacher's states at the student's levels, `[count, STEPS + 1, *latent]`."""
    teacher, kernel = load(name, STUDENTS[name].sampler)
    texts = captions(recipe.seed)
    names = [(next(texts), i) for i in range(count)]
    parts = []
    for start in tqdm(range(0, count, PART), desc="paths"):
        file = recipe.out / f"paths-{name}-{start}.safetensors"
        if not file.exists():
            samples = names[start : start + PART]
            prompts = [prompt for prompt, _ in samples]
            batch = Batch(prompts, samples, teacher.encode(prompts))
            path = rollout(teacher, kernel, batch, Noise(recipe.seed, "reference", samples), prior=True)
            states = path.latents[:, :: TEACHER_STEPS // STEPS].contiguous()
            save_file({"states": states.cpu()}, file.with_suffix(".partial"))
            os.replace(file.with_suffix(".partial"), file)
        parts.append(load_file(file)["states"])
    return [prompt for prompt, _ in names], torch.cat(parts)


def load(name: str, sampler: SamplerConfig, lora: LoraConfig | None = None) -> tuple[PipelineModel, Kernel]:
    """The teacher with its sampler, or, with `lora`, its student before training."""
    config = ModelConfig(name=name, lora=lora) if lora else ModelConfig(name=name, finetune="none")
    model = load_model(config, sampler)
    assert isinstance(model, PipelineModel)
    return model, make_kernel(model.spec, sampler)


def train(recipe: Recipe, name: str, texts: list[str], states: torch.Tensor, lr: float) -> PipelineModel:
    """The student, trained on the teacher's states `[N, STEPS + 1, *latent]`."""
    known = STUDENTS[name]
    sampler = known.sampler.model_copy(update={"steps": STEPS, "guidance": 1.0})
    model, kernel = load(name, sampler, known.lora)
    network: ModelMixin = model.network
    conditioning = Conditioning.join([model.encode([text]) for text in texts])

    def loss(generator: torch.Generator) -> torch.Tensor:
        row = torch.randint(len(states), (PART,), generator=generator)
        k = torch.arange(PART) % STEPS
        z, following = states[row, k].to(recipe.device), states[row, k + 1].to(recipe.device)
        output = model.predict(z, kernel.timesteps[k], conditioning[row])
        return mean_square(kernel.mean(z, output, k) - following).mean()

    fit(recipe, f"distil-{name}", {"student": network}, loss, lr=lr, decay=0.5)
    return model


def main(
    teacher: Annotated[str, typer.Argument(help="emoji or emoji_flow")] = "emoji_flow",
    out: Annotated[Path, typer.Option(help="work folder: the teacher's paths and checkpoints")] = Path("runs/distil"),
    paths: Annotated[int, typer.Option(help="paths of the teacher")] = 1536,
    steps: Annotated[int, typer.Option(help="optimiser steps, of 64 transitions each")] = 700,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Distil TEACHER to four steps and write its student."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(out, "cpu", seed, {f"distil-{teacher}": steps})
    texts, states = make_paths(recipe, teacher, paths)
    model = train(recipe, teacher, texts, states, lr)
    model.save(out / teacher)


if __name__ == "__main__":
    typer.run(with_home(main))
