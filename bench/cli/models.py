"""The commands on models: `bench convert`, and on a trained adapter `bench sample`, `bench export` and `bench push`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import completed, console, show_warnings


def sample(
    folder: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or of its adapter.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompt set or file; default: up to 8 of the run's test prompts.",
            metavar="NAME|FILE",
            parser=os.path.expanduser,
            autocompletion=completed("prompts"),
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt itself. Repeatable.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Images of each prompt.")] = 4,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; default: the evaluation's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the images; default: drawn, inside the run's.")] = None,
) -> None:
    """Draw images with a trained adapter, and with the prior on the same noise: files, an index, and a grid.

    bench sample runs/emoji/emoji_clip/nabla_gfn-seed0-1a2b3c4d --prompts my-prompts.txt --n 8
    bench sample my-adapter --prompt "red apple" --prompt lion --out pictures
    """
    show_warnings()
    from bench.prompts import listed, metadata
    from bench.runs.sample import sample as draw

    asked, known = [*(listed(prompts) if prompts else []), *(prompt or [])], metadata(prompts) if prompts else {}
    console.print(f"Images in {draw(folder, asked, n, seed, out, console, known)}")


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or of its adapter.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: export, inside the run's.")] = None,
) -> None:
    """Write a run's adapter for other programs: in diffusers', peft's and kohya's layout, and merged into a pipeline.

    bench export runs/sd15-hps/hps/nabla_gfn-seed0-1a2b3c4d --out my-adapter
    """
    show_warnings()
    from bench.runs.adapter import export as write

    out, layouts = write(folder, out)
    console.print(
        f"Wrote {out}, which diffusers reads, and in it {', '.join(layouts)}; README.md says how to load each."
    )


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, of its adapter, or of an export.")
    ],
    name: Annotated[str, typer.Argument(metavar="HUB-ID", help="Repository on the hub: organisation/name.")],
    public: Annotated[bool, typer.Option("--public", help="For everyone to see; a new repository is private.")] = False,
) -> None:
    """Upload a run's adapter with its model card to the Hugging Face hub.

    bench push runs/sd15-hps/hps/nabla_gfn-seed0-1a2b3c4d me/sd15-hps-nabla
    """
    show_warnings()
    from bench.runs.adapter import push as upload

    console.print(f"Uploaded to {upload(folder, name, public)}")


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint in one .safetensors.")],
    like: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Model of the same architecture: a name, a folder or a hub id. Of Stable Diffusion its configurations "
            "and tokenizers are used, and only these are fetched; of other families all parts but the denoiser.",
            parser=os.path.expanduser,
            autocompletion=completed("models"),
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder; default: beside the file, with its name.")] = None,
) -> None:
    """Convert a single-file checkpoint to a folder for --model.

    bench convert dreamshaper_8.safetensors --like sd15
    bench run nabla_gfn --model ./dreamshaper_8 --reward hps
    bench convert my_z_image.safetensors --like z-image-turbo
    """
    show_warnings()
    from bench.models.convert import convert as write

    out = out or file.with_suffix("")
    output = write(file, like, out)
    console.print(
        f"Wrote {out}. It predicts {output}, as {like} does; a file does not say it, so look at samples: "
        f"bench run --model {out.resolve()} --method prior",
    )
