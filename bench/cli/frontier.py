"""The command `bench frontier`: the least KL at every gain of reward."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bench.cli.options import (
    ModelName,
    PromptsName,
    RewardName,
    RunFolders,
    Set,
    SuiteName,
    console,
    show_warnings,
)
from bench.errors import BenchError


def frontier(
    paths: RunFolders = None,
    reward: RewardName = None,
    model: ModelName = None,
    prompts: PromptsName = None,
    suite: SuiteName = None,
    samples: Annotated[
        int | None,
        typer.Option(min=100, help="Samples of the prior for each prompt; default 512 pictures or 8192 points."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File; default: frontier.json beside the setting's runs.")] = None,
    assignments: Set = None,
) -> None:
    """The best that any method can do: the least KL to the prior at every gain of reward, from prior samples alone.

    With folders of runs or published tables, of every setting there. The curve stands in frontier.json beside the runs;
    bench report then shows it in its figures, and how near to it every run comes. Drawn samples are kept for other
    rewards and larger numbers.

        bench frontier --suite emoji --reward emoji_style
        bench frontier runs/emoji/emoji_style --samples 128
    """
    from bench.config import resolve
    from bench.reporting.frontier import write
    from bench.runs.frontier import default_file, tables, trace_prior

    named = {"model.name": model, "prompts.name": prompts}
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if paths:
        if overrides or reward or suite:
            raise BenchError("bench frontier takes folders of runs, or a model, reward and suite: give one of them.")
        from bench.publish.reproduce import configs_below

        wanted = [(config, [out] if out else files) for config, files in configs_below(paths, assignments or [])]
    else:
        config = resolve("prior", reward=reward, suite=suite, overrides=overrides, assignments=assignments)
        wanted = [(config, [out or default_file(config)])]
    show_warnings()
    for config, files in wanted:
        curve = trace_prior(config, samples, console)
        for table in tables(curve, f"{config.reward.name} on {config.model.name}, prompts {config.prompts.name}"):
            console.print(table)
        for file in files:
            write(file, [curve])
            console.print(f"Written: {file}")
