"""The command `bench judge`."""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.cli.options import (
    AddedMetrics,
    ModelName,
    PromptsName,
    RewardName,
    Set,
    SuiteName,
    console,
    show_warnings,
)
from bench.errors import BenchError


def judge(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE…",
            help="Adapters, folders of a denoiser or of a whole pipeline, runs; hub ids as org/name@revision:file.",
            show_default=False,
        ),
    ] = None,
    model: ModelName = None,
    reward: RewardName = None,
    prompts: PromptsName = None,
    suite: SuiteName = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the evaluation's noise.")] = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="Scale of the adapters; given once for all of them, or once for each.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="The sources are adapters of one model, which are added up.")
    ] = False,
    ode: Annotated[
        bool, typer.Option("--ode", help="A second row of each, sampled without noise as most authors do.")
    ] = False,
    cost: Annotated[
        str | None,
        typer.Option(metavar="KEY=N[,…]", help="What the author says the training cost: nfe, reward_calls, gpu_hours."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="What tables call it; default: its name.")] = None,
    metric: AddedMetrics = None,
    assignments: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the row; several rows get a folder each inside it.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Judge a folder of finished images instead, with index.csv or a --pattern.")
    ] = None,
    prior: Annotated[Path | None, typer.Option(help="With --images: a folder that the prior has drawn.")] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="With --images: how files are called, {number}-{sample}.png or {prompt}/{sample}.png."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew; an earlier run there is moved aside.")] = False,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes that share the work, one a GPU.")] = 1,
) -> None:
    """Measure models that were finetuned elsewhere: same prompts, noise and metrics as a run of this suite.

    The same command again resumes: sets of samples that were drawn are kept.

        bench judge ./my-lora --suite sd35-hps --prompts drawbench
        bench judge org/some-lora@main ./merged-pipeline ./transformer --suite sd35-hps
        bench judge ./style ./detail --together --scale 1 --scale 0.5 --model sdxl --reward pickscore
        bench judge runs/emoji/emoji_clip/nabla_gfn-seed0-1a2b3c4d
        bench judge --images ./drawn --prompts prompts.csv --prior ./drawn-by-the-prior
    """
    prompts = os.path.expanduser(prompts) if prompts else None
    if images:
        if words or model:
            raise BenchError("--images judges images alone: leave out --model and SOURCE, or leave out --images.")
        rest: dict[str, Any] = {"reward": reward, "suite": suite, "name": label, "cost": cost}
        rest |= {"metrics": metric or (), "assignments": assignments or []}
        _judge_images(images, prior, pattern, prompts, out, force, **rest)
        return
    if not words:
        raise BenchError("what is judged? Give an adapter, a folder or a hub id: bench judge ./my-lora --model sd15.")
    from bench.judge.judge import stated_cost

    keys = {"model.name": model, "prompts.name": prompts, "seed": seed}
    named: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    options: dict[str, Any] = {"label": label, "cost": stated_cost(cost), "reward": reward, "suite": suite}
    options |= {"named": named, "assignments": assignments or (), "metrics": metric or ()}
    _judge_models(words, scale or [], together, ode, out, force, num_processes, options)


def _judge_models(
    words: list[str],
    scales: list[float],
    together: bool,
    ode: bool,
    out: Path | None,
    force: bool,
    num_processes: int,
    options: Mapping[str, Any],
) -> None:
    """options: of `bench.judge.judge.configured`."""
    show_warnings()
    from bench.judge import judge as judging
    from bench.models.elsewhere import sources
    from bench.runs.preflight import preflight
    from bench.runs.rows import default_folder, label
    from bench.runtime import processes

    launching = num_processes > 1 and not processes.launched()
    first = nullcontext if launching else processes.main_first  # one that only launches holds no device
    console.quiet = not launching and not processes.is_main()
    with first():
        found = [sources.find(word) for word in words]
    groups = judging.grouped(found, scales, together)
    if options["label"] and len(groups) > 1:
        raise BenchError("--label names one model: judge them one by one, or leave it out.")
    jobs = []
    for group, weights in groups:
        config = judging.configured(group, weights, **options)
        with first():
            preflight(config)
        jobs += [(group, config), *([(group, judging.without_noise(config))] if ode else [])]
    if launching:
        raise typer.Exit(processes.launch(num_processes, sys.argv[1:]))
    from bench.runs.run import Run

    for group, config in jobs:
        folder = default_folder(config) if out is None else out if len(jobs) == 1 else out / default_folder(config).name
        job = Run(config, folder, console, judged=group)
        with ExitStack() as locks:
            if not job.go(force, locks):
                console.print("This is judged already; nothing was computed.")
        if processes.is_main():
            console.print(f"{label(config)}: {judging.sampler_text(config)}")
            job.report()


def _judge_images(
    images: Path,
    prior: Path | None,
    pattern: str | None,
    prompts: str | None,
    out: Path | None,
    force: bool,
    **options: Any,
) -> None:
    if prior is None or prompts is None:
        raise BenchError("--images needs --prompts, what was drawn, and --prior, a folder of images of the prior.")
    show_warnings()
    from bench.judge import images as judging
    from bench.judge.judge import stated_cost

    files, before = judging.found(images, prior, pattern, prompts)
    options["cost"] = stated_cost(options["cost"])
    config = judging.configured(images, files, prompts=prompts, **options)
    console.print(f"Results in {judging.judge_images(config, files, before, out, force, console)}")
