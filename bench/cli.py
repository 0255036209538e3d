"""The command `bench`. Nothing heavy is imported until a command runs."""

import logging
import os
import sys
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from bench.environment import check_packages
from bench.errors import BenchError, did_you_mean
from bench.training.stopping import Interrupted, signals_stop

console = Console()
application = typer.Typer(
    help="Compare reward-finetuning methods for diffusion models: one sampler, one evaluation, every method.\n\n"
    "Start with: bench run --method nabla_gfn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Kind(StrEnum):
    """What `bench ls` lists."""

    methods = "methods"
    rewards = "rewards"
    metrics = "metrics"
    models = "models"
    prompts = "prompts"
    suites = "suites"


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for example train.updates=50. Repeatable."),
]


@application.command()
def run(
    method: Annotated[str, typer.Option("--method", "-m", help="Finetuning method; see: bench ls methods.")],
    reward: Annotated[
        str | None,
        typer.Option("--reward", "-r", help="Reward; it also selects its natural suite. See: bench ls rewards."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Named model, local diffusers folder, or hub id.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt set, or a .txt/.json/.csv/.parquet file.")] = None,
    suite: Annotated[str | None, typer.Option(help="Named setting; see: bench ls suites.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of training noise, choices and weights.")] = None,
    updates: Annotated[int | None, typer.Option(help="Optimiser updates.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/SUITE/REWARD/METHOD-seedN-HASH.")] = None,
    assignments: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and its cost.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew; an earlier run in the folder is moved aside.")
    ] = False,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the run, one a GPU; accelerate launch works too.")
    ] = 1,
) -> None:
    """Finetune a model with one method, evaluate it, and write tables and pictures.

    The same command again resumes an interrupted run, or reports a finished one.

        bench run --method nabla_gfn
        bench run --method ddpo --reward emoji_style --updates 200 --seed 1
        bench run --method draft --set method.depth=1 --set optimizer.lr=1e-3
        bench run --method nabla_gfn --reward "hps+0.1*aesthetic" --num-processes 8
    """
    from bench.config import resolve

    named = {"model.name": model, "prompts.name": prompts, "seed": seed, "train.updates": updates}
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    config = resolve(method, reward=reward, suite=suite, overrides=overrides, assignments=assignments)
    show_warnings()

    from bench.commands.preflight import check, preflight
    from bench.evaluation.rows import default_folder
    from bench.training import processes

    folder = out or default_folder(config)
    if dry_run:
        from bench.commands.plan import show_plan

        check(config)
        show_plan(config, folder, num_processes, console)
        return
    if num_processes > 1 and not processes.launched():
        preflight(config)
        raise typer.Exit(processes.launch(num_processes, sys.argv[1:]))
    console.quiet = not processes.is_main()
    with ExitStack() as held:
        with processes.main_first():
            preflight(config)
            from bench.commands.run import Run

            job = Run(config, folder, console)
            finished = job.open(force and processes.is_main(), held)
        if finished:
            console.print("This run is finished; nothing was computed.")
        else:
            with traceback_log(folder):
                job.execute()
        if processes.is_main():
            job.report()


@application.command()
def fetch(
    suite: Annotated[str | None, typer.Option(help="Named setting; see: bench ls suites.")] = None,
    reward: Annotated[str | None, typer.Option("--reward", "-r", help="Reward; it selects its suite.")] = None,
    model: Annotated[str | None, typer.Option(help="Named model, local diffusers folder, or hub id.")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="Finetuning method.")] = "nabla_gfn",
    assignments: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say sizes only.")] = False,
) -> None:
    """Download what a setting needs: weights of model, rewards and feature spaces, and prompts. Sizes are said first.

    bench fetch --suite sd15-hps
    bench fetch --reward image_reward --model sd21 --dry-run
    """
    from bench.config import resolve

    overrides = {} if model is None else {"model.name": model}
    config = resolve(method, reward=reward, suite=suite, overrides=overrides, assignments=assignments)
    show_warnings()
    from bench.commands.plan import show_requirements
    from bench.weights.hub import obtain
    from bench.weights.requirements import requirements

    needs = requirements(config)
    show_requirements(needs, console)
    if not dry_run:
        obtain(needs)
        console.print("Everything is here.")


@application.command("ls")
def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
) -> None:
    """List what can be named: methods, rewards, metrics, models, prompts, suites."""
    from bench.commands.listing import describe

    for chosen in [kind] if kind else Kind:
        table = Table(title=chosen.value, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("name", style="cyan", no_wrap=True)
        table.add_column("what it is")
        for name, text in describe(chosen.value).items():
            table.add_row(name, text)
        console.print(table)
        console.print()


@application.command("eval")
def evaluate_run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    assignments: Set = None,
) -> None:
    """Evaluate a finished run again, for example with more samples.

        bench eval runs/emoji/emoji_clip/nabla_gfn-seed0-1a2b3c4d --set evaluation.samples_per_prompt=32

    Results go into a folder of their own inside the run's.
    """
    show_warnings()
    from bench.commands.run import evaluate_again

    path = evaluate_again(folder, assignments or [], console)
    console.print(f"Results in {path}")


@application.command()
def report(
    paths: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders of them; default runs/.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated metrics; default all that have values.")] = None,
    at_updates: Annotated[
        int | None, typer.Option(min=1, help="Compare every run's last evaluation within so many updates.")
    ] = None,
    at_reward_calls: Annotated[int | None, typer.Option(min=1, help="The same within so many reward calls.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and figures; default: print tables.")] = None,
) -> None:
    """Compare finished runs: a Markdown table for every setting, methods as rows, and figures.

    bench report runs/emoji --metrics reward/train,reward/heldout,path_kl
    bench report runs/ring --at-reward-calls 50000 --out report
    """
    from results import report as results
    from results.selection import collect

    if at_updates and at_reward_calls:
        raise BenchError("--at-updates and --at-reward-calls are two comparisons: give one of them.")
    cost = "updates" if at_updates else "reward_calls" if at_reward_calls else None
    limit, chosen = at_updates or at_reward_calls or 0, metrics.split(",") if metrics else None
    try:
        frame, left_out = collect(paths or [Path("runs")])
        known = set(frame["metric"])
        for name in chosen or []:
            if name not in known:
                raise BenchError(f"--metrics: no row has {name!r}{did_you_mean(name, known)}")
        compared = frame, left_out, chosen, cost, limit
        if out:
            console.print(f"Written: {results.write_report(out, *compared)}")
        else:
            typer.echo(results.report(*compared))
    except (FileNotFoundError, ValueError) as error:
        raise BenchError(str(error)) from None


@application.command()
def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="What to run; see below.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at once; overrides the file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every run's state and command.")] = False,
) -> None:
    """Run the product of methods, seeds and settings, several processes at once.

    Finished runs are skipped, interrupted ones resumed; a failed run does not stop the others. The file:

        suite: ring
        methods: [nabla_gfn, ddpo]
        seeds: 10                                   # or a list
        set: {train.updates: 400}                   # every run
        settings: {ddpo: {optimizer.lr: 6.0e-4}}    # by method
        grid: {reward.beta: [0.5, 1.0]}             # every combination
        tune: {grid: {optimizer.lr: [1.0e-4, 1.0e-3]}, seed: 100, largest: reward/train}
        threads: 1

    With tune: every method is first tried with each value, on a seed of its own; what the rule chose is written to
    tuned.yaml and used. Compare the runs with bench report.
    """
    show_warnings()
    from bench.commands import sweep as sweeps

    read = sweeps.read_sweep(spec)
    read = read.model_copy(update={"workers": workers}) if workers else read
    if dry_run:
        for job in sweeps.plan(read):
            typer.echo(f"{job.state:8} {job.command}")
        return
    sweeps.plan_sweep(read)  # what is impossible is told before anything runs
    choices, trials = sweeps.tune(read, console)
    jobs = sweeps.plan_sweep(read, choices)
    failed = sweeps.run_sweep(read, jobs, console)
    for job in [*trials, *failed]:
        words = sweeps.last_words(job.log)
        console.print(f"[red]failed:[/red] {job.folder.name}: {words} (see {job.log})", soft_wrap=True)
    if trials:
        console.print("Methods with a failed trial were not run; the same command tries it again.")
    console.print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are in {read.out}. Compare: bench report {read.out}")
    if trials or failed:
        raise typer.Exit(1)


class Size(StrEnum):
    """Of random weights."""

    full = "full"
    tiny = "tiny"


@application.command("profile")
def profile_setting(
    method: Annotated[str, typer.Option("--method", "-m", help="Finetuning method.")] = "nabla_gfn",
    reward: Annotated[str | None, typer.Option("--reward", "-r", help="Reward.")] = None,
    model: Annotated[str | None, typer.Option(help="Named model, local diffusers folder, or hub id.")] = None,
    suite: Annotated[str | None, typer.Option(help="Named setting.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed pairs of sampler calls, and timed rounds.")] = 5,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build the architectures with random weights; download nothing.")
    ] = False,
    size: Annotated[Size, typer.Option(help="Of random weights; tiny only tries the code.")] = Size.full,
    every: Annotated[
        bool, typer.Option("--all", help="An update of every trained method, beside the rows that it needs.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File; default: named as a run, below runs/profiles.")] = None,
    assignments: Set = None,
) -> None:
    """Time the sampler against diffusers' own, and one update by phase; memory and network calls of both.

        bench profile --method nabla_gfn
        bench profile --model sd15 --reward hps --method ddpo --random-weights
        bench profile --all

    With --all: rows through the denoiser, reward calls, seconds and memory of an update of every method, and beside the
    rows those that its equations need; rounds of 2 prompts x 4 samples and one update, unless --set says otherwise.
    """
    from contextlib import nullcontext

    from bench import registry
    from bench.commands.preflight import check
    from bench.config import resolve

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
            console.print(f"left out: {escape(str(error))}", highlight=False)
        else:
            if not every or registry.load("methods", name).needs.training:
                configs.append(config)
    if not configs:
        raise BenchError("no method can be profiled in this setting.")
    show_warnings()
    from bench.commands import profile
    from bench.evaluation.rows import default_folder

    place = default_folder(configs[0])
    out = out or Path("runs/profiles", *place.parts[1:-1], "all" if every else place.name).with_suffix(".json")
    with profile.random_weights(configs[0], size, console) if random_weights else nullcontext():
        if every:
            profile.profile_all(configs, console, out)
        else:
            profile.profile(configs[0], repeats, console, out)


@application.command("selftest")
def test_plugin(
    name: Annotated[str, typer.Argument(help="A method, reward, metric or model, or a folder of one; yours included.")],
    kind: Annotated[Kind | None, typer.Option(help="Needed only if the name is taken in several kinds.")] = None,
) -> None:
    """Check a plugin against the contract that all rows of a table rest on.

        bench selftest nabla_gfn
        bench selftest emoji
        bench selftest ./folder-of-a-pipeline

    Shapes, declared needs, determinism, batch-size invariance, gradients, stored state, the target distribution where a
    method declares it; of a model the adapter's switch, what its output means, and diffusers' own call. Exits with
    status 1 if a check fails.
    """
    show_warnings()
    from bench import registry
    from bench.commands.selftest import KINDS, selftest
    from bench.models.catalogue import NAMED
    from bench.weights.hub import obtain

    names = {k: [*registry.plugins(k), *(NAMED if k == "models" else ())] for k in KINDS}
    kinds = [k for k in KINDS if name in names[k] and kind in (None, k)]
    if not kinds and ("/" in name or Path(name).is_dir()):
        kinds = ["models"]
    if len(kinds) > 1:
        raise BenchError(f"{name!r} is a name of {' and '.join(kinds)}: choose with --kind.")
    if not kinds:
        raise BenchError(f"unknown plugin {name!r}{did_you_mean(name, [own for k in KINDS for own in names[k]])}")
    if kinds != ["models"]:
        obtain(getattr(registry.load(kinds[0], name), "files", ()))
    colors, failed = {"passed": "green", "failed": "red", "skipped": "yellow"}, False
    with console.status(f"testing {name}"):
        for found in selftest(kinds[0], name):
            failed |= found.status == "failed"
            mark, detail = f"[{colors[found.status]}]{found.status:7}[/]", escape(found.detail)
            console.print(f"{mark} [bold]{found.check}[/bold]: {detail}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@application.command()
def doctor(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Try everything on the GPU, against the CPU; about five minutes.")
    ] = False,
    out: Annotated[Path, typer.Option(help="With --gpu: the report, to send.")] = Path("gpu-report.json"),
    full: Annotated[
        bool, typer.Option("--full", help="With --gpu: time the published batch and HPSv2.1, not a short one.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="With --gpu: steps whose name holds it. Repeatable.")
    ] = None,
    device: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Report versions, devices, extras and weights, and what is missing.

        bench doctor
        bench doctor --gpu --out report.json

    With --gpu every method, reward and feature space runs on the GPU with small random weights and is compared with the
    CPU; then resuming, several processes, and the speed at full size, with random weights too. Exits with status 1 if
    a step fails.
    """
    show_warnings()
    if not gpu:
        from bench.commands.doctor import report

        report(console)
        return
    import torch

    from bench.commands.gpu import check_device, require_gpu

    chosen = torch.device(device) if device else require_gpu()
    if not check_device(chosen, console, out, full=full, only=only or ()):
        raise typer.Exit(1)


def show_warnings() -> None:
    """Warnings go through rich."""
    logging.basicConfig(
        level=logging.WARNING, handlers=[RichHandler(console=console, show_path=False)], format="%(message)s"
    )


class traceback_log:
    """Write the traceback of an error into the run's folder, where whoever looks for the cause finds it."""

    def __init__(self, folder: Path):
        rank = os.environ.get("RANK", "0")
        self.path = folder / ("error.log" if rank == "0" else f"error-{rank}.log")  # of several processes, each its own

    def __enter__(self) -> None:
        self.path.unlink(missing_ok=True)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            import traceback as formatting

            self.path.write_text("".join(formatting.format_exception(error)), encoding="utf8")


def app() -> None:
    """Entry point: errors meant for people are printed as they are and exit with status 2."""
    try:
        check_packages()
        with signals_stop():
            application()
    except BenchError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # of several processes one speaks and a launcher ends the others; unless this failed alone
        Console(stderr=True).print("[red]Error:[/red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        Console(stderr=True).print(f"[red]Error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            resumes = " The same command resumes from the last checkpoint." * (sys.argv[1:2] in (["run"], ["sweep"]))
            Console(stderr=True).print(f"Interrupted.{resumes}", highlight=False)
        sys.exit(error.status)
