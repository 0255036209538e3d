"""Few-step students of the embedded priors: ``python -m bench.recipe.distil emoji_flow`` (or ``emoji``).

The student is its teacher with an adapter. It learns the teacher's own deterministic, guided path: from the state at
one of its few levels it steps to the teacher's state at the next, which takes the teacher several steps (trajectory
distillation). So it needs no guidance. Nothing is fetched: the paths begin with noise and the recipe's captions.

The work folder gets the teacher's paths, in parts, and checkpoints; a killed run continues. ``--measure`` compares the
students that ship with their teachers, and writes the model card.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torchvision.utils import make_grid, save_image
from tqdm import tqdm
from transformers import CLIPModel

from bench.cli.options import with_home
from bench.evaluation.features import EfficientNetLite0
from bench.model import Conditioning
from bench.models.catalogue import load_model, make_kernel
from bench.models.emoji import GUIDANCE, STYLES, TURBO, WEIGHTS, concepts
from bench.models.lora import LORA_FILE
from bench.models.pipeline import PipelineModel
from bench.recipe.art import Concept, caption
from bench.recipe.evaluate import clip_rank, enlarge, frechet, top
from bench.recipe.loop import Recipe, fit
from bench.sampling.kernel import Kernel, mean_square
from bench.sampling.noise import Noise
from bench.sampling.trajectory import Batch, rollout
from bench.settings import LoraConfig, ModelConfig, SamplerConfig

STEPS = 4
TEACHER_STEPS = 20  # of the teacher where it is measured; its paths may be of fewer, a multiple of STEPS
PART = 64  # paths in a file of the cache, and rows of a batch of samples
REFERENCE = 256  # samples of the teacher, of random captions, that distances are measured to
SHOWN = ("tiger", "penguin", "strawberry", "octopus")  # prompts of the picture
LINEAR = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|linear|linear_[12]|net\.0\.proj|net\.2|proj_out"
CONVOLUTION = r"conv|conv[12]|conv_in|conv_out|conv_shortcut|time_emb_proj|proj_in"

CARD = """# Model card: `emoji_turbo` and `emoji_flow_turbo`

<!-- written by `python -m bench.recipe.distil --measure`: edit the template there, not this page -->

Students of [`emoji` and `emoji_flow`](../README.md) that draw in 4 steps without guidance, with a tenth of the NFE.
Each is its teacher with the adapter in this folder (LoRA of rank 28 on every layer, float16,
{size:.1f} MB together), merged when it is loaded:

    from diffusers import StableDiffusion3Pipeline
    from bench.models.emoji import FLOW, student
    pipe = StableDiffusion3Pipeline.from_pretrained(FLOW, **student(FLOW))

The teacher's deterministic path at guidance 3 has states at the student's four noise levels (grid `shifted` of the
flow, `trailing` of the diffusion), and the student learns by squared error to step from each to the next. The commands
were `python -m bench.recipe.distil emoji_flow --paths 1024 --teacher-steps 20 --steps 350` and `python -m
bench.recipe.distil emoji --paths 1280 --teacher-steps 8 --steps 240 --batch 32 --lr 2e-3`: five to ten minutes each of
one thread, which is little.

![Samples, for each prompt the teacher in 20 steps, the student in 4, the teacher in 4; the columns share their first
noise](samples.png)

Measured on two samples of each of {concepts} concepts' plain names by `python -m bench.recipe.distil --measure`. The
Fréchet distance is to {reference} samples of the teacher in 20 steps for random captions, in features of
EfficientNet-Lite0; at this number it is biased upward, so each teacher's first row is what to compare with, and a few
units are noise. The other columns are the shares of samples whose concept `emoji_clip` finds first, and among the first
five (standard error 2.5 %).

| model | steps | NFE | Fréchet distance | first | first five |
|---|---|---|---|---|---|
{table}

## Limits

- The student knows its four noise levels alone: other steps, grids or guidance are refused.
- The first noise decides most of its sample, and its output is no mean given z: methods that build on the contrary are
  [refused](../../../../docs/methods.md#few-step-students).
- Those of its teacher; and outlines are softer.

The art: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji 3D (MIT). See NOTICE at the repository's root.
"""


@dataclass(frozen=True)
class Student:
    """sampler: the student's, whose noise levels are among those of more steps on its grid. lora: its adapter."""

    sampler: SamplerConfig
    lora: LoraConfig

    def teacher(self, steps: int) -> SamplerConfig:
        """The teacher's sampler."""
        return self.sampler.model_copy(update={"steps": steps, "guidance": GUIDANCE})


STUDENTS = {
    "emoji_flow": Student(
        SamplerConfig(steps=STEPS, eta=0, guidance=1, spacing="shifted", final_noise=0),
        LoraConfig(rank=28, target_modules=rf"(.*\.)?({LINEAR}|context_embedder)"),
    ),
    "emoji": Student(
        SamplerConfig(steps=STEPS, eta=0, guidance=1, spacing="trailing"),
        LoraConfig(rank=28, target_modules=rf"(.*\.)?({LINEAR}|{CONVOLUTION})"),
    ),
}


def captions(seed: int) -> Iterator[str]:
    """Random captions of random concepts, without end."""
    rng = np.random.default_rng(seed)
    known = [Concept(**entry | {"names": tuple(entry["names"])}) for entry in concepts()]
    while True:
        yield caption(known[rng.integers(len(known))], STYLES[rng.integers(len(STYLES))], rng)


def load(name: str, sampler: SamplerConfig, lora: LoraConfig | None = None) -> tuple[PipelineModel, Kernel]:
    """A model with a sampler; with `lora`, an adapter to train."""
    config = ModelConfig(name=name, lora=lora) if lora else ModelConfig(name=name, finetune="none")
    model = load_model(config, sampler)
    assert isinstance(model, PipelineModel)
    return model, make_kernel(model.spec, sampler)


@torch.no_grad()
def states(model: PipelineModel, kernel: Kernel, names: list[tuple[str, int]], noise: Noise) -> torch.Tensor:
    """The path of each named sample, [N, K + 1, *latent]."""
    prompts = [prompt for prompt, _ in names]
    return rollout(model, kernel, Batch(prompts, names, model.encode(prompts)), noise).latents


def make_paths(out: Path, name: str, count: int, steps: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Captions, and the states of a teacher of so many steps at the student's levels, `[count, STEPS + 1, *latent]`."""
    teacher, kernel = load(name, STUDENTS[name].teacher(steps))
    texts, parts = captions(seed), []
    names = [(next(texts), i) for i in range(count)]
    for start in tqdm(range(0, count, PART), desc="paths"):
        file = out / f"paths-{name}-{steps}-{start}.safetensors"
        if not file.exists():
            part = names[start : start + PART]
            whole = states(teacher, kernel, part, Noise(seed, "reference", part))
            kept = whole[:, :: steps // STEPS].contiguous()
            save_file({"states": kept}, file.with_suffix(".partial"))
            os.replace(file.with_suffix(".partial"), file)
        parts.append(load_file(file)["states"])
    return [prompt for prompt, _ in names], torch.cat(parts)


def train(recipe: Recipe, name: str, texts: list[str], path: torch.Tensor, batch: int, lr: float) -> PipelineModel:
    """The student, trained on the teacher's states `[N, STEPS + 1, *latent]`."""
    model, kernel = load(name, STUDENTS[name].sampler, STUDENTS[name].lora)
    conditioning = Conditioning.join([model.encode([text]) for text in texts])

    def loss(generator: torch.Generator) -> torch.Tensor:
        row = torch.randint(len(path), (batch,), generator=generator)
        k = torch.arange(batch) % STEPS
        z, following = path[row, k], path[row, k + 1]
        output = model.predict(z, kernel.timesteps[k], conditioning[row])
        return mean_square(kernel.mean(z, output, k) - following).mean()

    fit(recipe, f"distil-{name}", {"student": model.network}, loss, lr=lr, decay=0.5)
    return model


def export(model: PipelineModel, folder: Path) -> None:
    """Write the adapter as float16 into `folder`."""
    model.save(folder)
    adapter = {name: tensor.half() for name, tensor in load_file(folder / LORA_FILE).items()}
    save_file(adapter, folder / LORA_FILE, {"format": "pt"})


def draw(model: PipelineModel, kernel: Kernel, names: list[tuple[str, int]], seed: int) -> torch.Tensor:
    """Images [N, 3, 32, 32] of named samples."""
    parts = [names[start : start + PART] for start in range(0, len(names), PART)]
    paths = [states(model, kernel, part, Noise(seed, "evaluate", part)) for part in parts]
    return decode(model, torch.cat([path[:, -1] for path in paths]))


@torch.no_grad()
def decode(model: PipelineModel, latents: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, 32, 32] in [0, 1]."""
    return torch.cat([model.decode(part) for part in latents.split(PART)])


def measure(out: Path, name: str, seed: int) -> tuple[list[str], torch.Tensor]:
    """Rows of the card's table, and images of `SHOWN`: by the teacher, the student, and the teacher in few steps."""
    student, known = STUDENTS[name], [concept["name"] for concept in concepts()]
    labels = torch.arange(2 * len(known)) % len(known)
    names = [(known[label], i) for i, label in enumerate(labels.tolist())]
    models = [
        (name, *load(name, student.teacher(TEACHER_STEPS))),
        (f"{name}_turbo", *load(f"{name}_turbo", student.sampler)),
        (name, *load(name, student.teacher(STEPS))),
    ]
    features, clip = EfficientNetLite0(), CLIPModel.from_pretrained(WEIGHTS / "clip").float().eval()
    _, paths = make_paths(out, name, REFERENCE, TEACHER_STEPS, seed)
    reference = features(decode(models[0][1], paths[:, -1]))
    shown = [(prompt, i) for prompt in SHOWN for i in range(12)]
    rows, pictures = [], []
    for title, model, kernel in tqdm(models, desc=name):
        images = draw(model, kernel, names, seed)
        found = top(clip_rank(clip, model.pipeline.tokenizer, known, images, labels))
        network = kernel.steps * model.rows(model.guidance)
        distance = frechet(features(images), reference)
        rows.append(
            f"| `{title}` | {kernel.steps} | {network} | {distance:.1f} | {found['top1']:.1%} | {found['top5']:.1%} |"
        )
        typer.echo(rows[-1])
        pictures.append(draw(model, kernel, shown, seed).unflatten(0, (len(SHOWN), 12)))
    return rows, torch.stack(pictures, 1).flatten(0, 2)


def write_card(out: Path, seed: int) -> None:
    """Measure both students and write their card and picture."""
    table, pictures = zip(*(measure(out, name, seed) for name in STUDENTS), strict=True)
    save_image(enlarge(make_grid(torch.cat(pictures), nrow=12, padding=1, pad_value=1.0)), TURBO / "samples.png")
    text = CARD.format(
        size=sum(file.stat().st_size for file in TURBO.rglob(LORA_FILE)) / 1e6,
        concepts=len(concepts()),
        reference=REFERENCE,
        table="\n".join(row for rows in table for row in rows),
    )
    (TURBO / "README.md").write_text(text, encoding="utf8")


def main(
    teacher: Annotated[str, typer.Argument(help="emoji or emoji_flow")] = "emoji_flow",
    out: Annotated[Path, typer.Option(help="work folder: the teacher's paths and checkpoints")] = Path("runs/distil"),
    paths: Annotated[int, typer.Option(help="paths of the teacher")] = 2048,
    teacher_steps: Annotated[int, typer.Option(help="steps of a path, a multiple of 4")] = 8,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 600,
    batch: Annotated[int, typer.Option(help="transitions of an optimiser step")] = 64,
    lr: float = 1e-3,
    seed: int = 0,
    measured: Annotated[bool, typer.Option("--measure", help="only measure the students that ship")] = False,
) -> None:
    """Distil TEACHER to four steps, and put its student where `emoji_turbo` and `emoji_flow_turbo` are read from."""
    out.mkdir(parents=True, exist_ok=True)
    if measured:
        write_card(out, seed)
        return
    recipe = Recipe(out, "cpu", seed, {f"distil-{teacher}": steps})
    texts, path = make_paths(out, teacher, paths, teacher_steps, seed)
    export(train(recipe, teacher, texts, path, batch, lr), TURBO / teacher)


if __name__ == "__main__":
    typer.run(with_home(main))
