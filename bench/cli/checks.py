"""The commands that look at the program and the machine: `bench profile`, `bench selftest`, `bench doctor`."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from bench.cli.options import Kind, MethodName, ModelName, RewardName, Set, SuiteName, console, show_warnings
from bench.errors import BenchError, did_you_mean


class Size(StrEnum):
    """Size of the random weights."""

    full = "full"
    tiny = "tiny"


def profile_setting(
    method: MethodName = "nabla_gfn",
    reward: RewardName = None,
    model: ModelName = None,
    suite: SuiteName = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed pairs of sampler calls, and timed rounds.")] = 5,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build the architectures with random weights; download nothing.")
    ] = False,
    size: Annotated[Size, typer.Option(help="Size of the random weights; tiny only tries the code.")] = Size.full,
    every: Annotated[
        bool, typer.Option("--all", help="An update of every trained method, with the NFE that its equations need.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File; default: named as a run, below runs/profiles.")] = None,
    assignments: Set = None,
) -> None:
    """Time the sampler against diffusers' own, and one update by phase; memory and network calls of both.

    With --all: NFE, reward calls, seconds and memory of an update of every method, and beside its NFE the one that its
    equations need; rounds of 2 prompts x 4 samples and one update, unless --set says otherwise.

        bench profile --method nabla_gfn
        bench profile --model sd15 --reward hps --method ddpo --random-weights
        bench profile --all
    """
    from contextlib import nullcontext

    from bench import registry
    from bench.config import resolve
    from bench.runs.preflight import check

    overrides: dict[str, Any] = {} if model is None else {"model.name": model}
    if every:
        overrides |= {"train.prompts_per_round": 2, "train.samples_per_prompt": 4, "train.updates_per_round": 1}
    configs = []
    for name in registry.plugins("methods") if every else [method]:
        try:
            config = resolve(name, reward=reward, suite=suite, overrides=overrides, assignments=assignments)
            check(config)
        except BenchError as error:
            if not every:
                raise
            console.print(f"left out: {error}")
        else:
            if not every or registry.load("methods", name).needs.training:
                configs.append(config)
    if not configs:
        raise BenchError("no method can be profiled in this setting.")
    show_warnings()
    from bench.diagnose import profile
    from bench.runs.rows import default_folder

    place = default_folder(configs[0])
    out = out or Path("runs/profiles", *place.parts[1:-1], "all" if every else place.name).with_suffix(".json")
    with profile.random_weights(configs[0], size.value, console) if random_weights else nullcontext():
        if every:
            profile.profile_all(configs, console, out)
        else:
            profile.profile(configs[0], repeats, console, out)


def test_plugin(
    name: Annotated[
        str,
        typer.Argument(
            help="A method, reward, metric or model, or a folder of one; yours included.",
            metavar="NAME",
            parser=os.path.expanduser,
        ),
    ],
    kind: Annotated[Kind | None, typer.Option(help="Needed only if the name is taken in several kinds.")] = None,
) -> None:
    """Check a plugin against the contract that all rows of a table rest on.

    Shapes, declared needs, determinism, batch-size invariance, gradients, stored state, the target distribution where a
    method declares it; of a model the adapter's switch, what its output means, and diffusers' own call. Exits with
    status 1 if a check fails.

        bench selftest nabla_gfn
        bench selftest emoji
        bench selftest ./folder-of-a-pipeline
    """
    show_warnings()
    from bench import registry
    from bench.diagnose.selftest import KINDS, selftest
    from bench.hub import obtain
    from bench.models import catalogue

    names = {k: list(registry.plugins(k)) for k in KINDS}
    names["models"] = [*catalogue.names(), *registry.plugins("pipelines")]
    kinds = [k for k in KINDS if name in names[k] and kind in (None, k)]
    if not kinds and ("/" in name or Path(name).is_dir()):
        kinds = ["models"]
    if len(kinds) > 1:
        raise BenchError(f"{name!r} is a name of {' and '.join(kinds)}: choose with --kind.")
    if not kinds:
        raise BenchError(f"unknown plugin {name!r}{did_you_mean(name, [plugin for k in KINDS for plugin in names[k]])}")
    if kinds != ["models"]:
        obtain(getattr(registry.load(kinds[0], name), "files", ()))
    colors, failed = {"passed": "green", "failed": "red", "skipped": "yellow"}, False
    with console.status(f"testing {name}"):
        for outcome in selftest(kinds[0], name):
            failed |= outcome.status == "failed"
            mark, check = (f"{outcome.status:7}", colors[outcome.status]), (outcome.check, "bold")
            console.print(Text.assemble(mark, " ", check, f": {outcome.detail}"))
    if failed:
        raise typer.Exit(1)


def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Try everything on the GPU, against the CPU; about five minutes.")
    ] = False,
    out: Annotated[Path, typer.Option(help="With --gpu: the report, to send.")] = Path("gpu-report.json"),
    full: Annotated[
        bool, typer.Option("--full", help="With --gpu: time the published batch and HPSv2.1, not a short one.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="With --gpu: only steps whose name contains TEXT. Repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Report versions, devices, extras and weights, and what is missing.

    With --gpu every method, reward and feature space runs on the GPU with small random weights and is compared with the
    CPU; then resuming, several processes, and the speed at full size, with random weights too. Exits with status 1 if
    a step fails.

        bench doctor
        bench doctor --gpu --out report.json
    """
    show_warnings()
    if not gpu:
        from bench.diagnose.doctor import report

        report(console)
        return
    import torch

    from bench.diagnose.gpu import check_device, require_gpu

    chosen = torch.device(device) if device else require_gpu()
    if not check_device(chosen, console, out, full=full, only=only or ()):
        raise typer.Exit(1)
