"""What a run will take, before it starts: `bench run --dry-run`, and the sizes that `bench fetch` prints first."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import registry
from bench.config import beta_origin
from bench.hub import Requirement, size_text
from bench.models.precision import network_dtype
from bench.prompts import HUB, SPLITS, load_prompts
from bench.runs.combinations import combinations_text
from bench.runs.duration import measured_time, prediction_rows
from bench.runs.estimate import LARGEST, estimate_memory, with_batches
from bench.runs.requirements import requirements
from bench.settings import RunConfig


def show_plan(
    config: RunConfig, folder: Path | str, processes: int, console: Console, gpu_memory: int | None = None
) -> None:
    """Print the resolved configuration, what it will compute, what it will need, and where it goes.

    gpu_memory: bytes of the GPU that it is for; None: of this machine's.
    """
    console.print(config.to_yaml())
    console.print(f"reward.beta: {config.reward.beta:g} ({beta_origin(config)})")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = with_batches(config, device, processes)
    for name, value in plan(config, processes).items():
        console.print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    dtype = network_dtype(config.model, device)
    memory = estimate_memory(config, dtype, processes)
    if memory:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in memory.items())
        total = sum(memory.values()) / 2**30
        console.print(f"estimated memory a process: {total:.1f} GiB ({parts}; {dtype} network)")
    if gpu_memory is None and device.type == "cuda":
        gpu_memory = torch.cuda.mem_get_info()[1]
    for line in combinations_text(config, gpu_memory, processes):
        console.print(line)
    with console.status("trying a piece of the run"):
        text = measured_time(config, memory)
    console.print(f"time{' in one process' * (processes > 1)}: {text}")
    if not config.model.t5:
        console.print(
            "model.t5 = false: the T5 encoder is neither fetched nor loaded, and its text states are zeros. CLIP alone "
            "reads a prompt, 77 tokens of it: long prompts and written words suffer. It is another prior."
        )
    console.print(f"folder: {folder}")
    if needs := requirements(config):
        show_requirements(needs, console)


def plan(config: RunConfig, processes: int = 1) -> dict[str, int | str]:
    """What a run will compute, from its configuration alone: samples, and its NFE outside losses."""
    train, evaluation = config.train, config.evaluation
    method = registry.load("methods", config.method.name)
    needs = method.needs
    trajectories = train.prompts_per_round * train.samples_per_prompt
    rows, evaluation_rows = (
        prediction_rows(config, sampler) for sampler in (config.sampler, config.evaluation_sampler())
    )
    absent = (need := HUB.get(config.prompts.name)) and need.missing()
    prompts = None if absent else load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    counts = {split: getattr(evaluation, f"{split}_prompts") for split in SPLITS}
    if prompts:
        counts = {split: min(count, len(getattr(prompts, split))) for split, count in counts.items()}
    samples = sum(counts.values()) * evaluation.samples_per_prompt
    evaluated = " + ".join(f"{count} {split}" for split, count in counts.items())
    update = -(-trajectories // train.updates_per_round)
    shards = 1 if needs.whole_update else -(-update // (train.micro_batch or LARGEST))
    strength = method.strength
    return {
        "strength": f"{strength.setting}, in a sweep {strength.text()}" if strength else "early stopping alone",
        "prompts": ", ".join(f"{len(getattr(prompts, split))} {split}" for split in SPLITS)
        if prompts
        else "not here yet",
        "updates": train.updates,
        "rounds": train.rounds,
        "trajectories per round": trajectories,
        "trajectories per update": update,
        "shards of an update": f"{shards}, shared by {processes} process{'es' * (processes > 1)}"
        + (" (some idle: lower train.micro_batch)" if shards < processes else ""),
        "NFE of training rollouts": train.rounds * trajectories * rows * needs.training * needs.trajectory,
        "evaluation samples per set": f"{samples:,} ({evaluated} prompts × {evaluation.samples_per_prompt})",
        # three prior sets (cached), and each time the finetuned model with the prior beside it
        "NFE of evaluation": samples * evaluation_rows * (3 + 2 * len(config.evaluated_at())),
    }


def show_requirements(needs: Sequence[Requirement], console: Console) -> None:
    """Print what a setting needs from elsewhere, its size, and whether it is here."""
    table = Table(box=None, pad_edge=False)
    for heading in ("from", "size", "state"):
        table.add_column(heading, overflow="fold")
    for need in needs:
        missing = need.missing()
        state = Text("here", "green")
        if missing:
            state = Text.assemble(("missing", "yellow"), f" {len(missing)} files")
        table.add_row(need.source, size_text(need.size), state)
    console.print(table)
    absent = [need for need in needs if need.missing()]
    total = size_text(sum(need.size for need in absent)) if absent else "nothing"
    console.print(f"To download: {total}.")
