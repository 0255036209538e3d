"""`bench doctor --gpu`: everything that runs on a GPU, tried there and compared with the CPU, for a report to send.

All but the timings runs on scaled-down random weights, through the code that loads the real ones. A step that fails is
recorded with its traceback and does not stop the others; the report is rewritten after every step, so that it survives
a crash. Nothing on the device is set or reset, save the statistics of its memory.
"""

import gc
import json
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bench import environment
from bench.diagnose.gpu_steps import Found, steps
from bench.diagnose.profile import stand_ins
from bench.diagnose.selftest.checking import Skipped
from bench.errors import BenchError
from bench.hub import Repository
from bench.runtime import processes
from bench.runtime.files import write_atomic


@dataclass
class Outcome:
    """What became of a step: status is "ok", "failed" or "not tried"; error: the traceback's text."""

    step: str
    status: str
    seconds: float
    note: str
    data: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def require_gpu() -> torch.device:
    """The device to try. Raises BenchError, in one sentence, where there is none."""
    if torch.cuda.is_available():
        return processes.state().device
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    raise BenchError(
        "bench doctor --gpu needs an NVIDIA GPU (of 24 GB for its timings) with a driver and a torch that fit, and "
        f"torch {torch.__version__}, which {built}, sees none here."
    )


def check_device(
    device: torch.device, console: Console, out: Path, *, full: bool = False, only: Sequence[str] = ()
) -> bool:
    """Run all steps, or those whose name holds one of `only`; print a table, store the report; whether none failed."""
    from bench.models.random_weights import WRITERS

    outcomes: list[Outcome] = []
    report: dict[str, Any] = {"environment": environment.describe(), "device": device_facts(device), "full": full}
    columns = [TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeElapsedColumn()]
    with ExitStack() as stack:
        own_cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-doctor-"))
        chosen = {
            name: run
            for name, run in steps(device, full, Path(own_cache), stack).items()
            if not only or any(text in name for text in only)
        }
        if not chosen:
            raise BenchError(f"no step of bench doctor --gpu is named like {' or '.join(map(repr, only))}.")
        stack.enter_context(stand_ins([Repository(name, ()) for name in WRITERS], "tiny", console))
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("", total=len(chosen))
        for name, run in chosen.items():
            progress.update(task, description=name)
            outcomes.append(_try(name, run))
            progress.advance(task)
            write_atomic(out, json.dumps(report | {"steps": [asdict(one) for one in outcomes]}, indent=1).encode())
    _show(outcomes, console)
    failed = sum(one.status == "failed" for one in outcomes)
    console.print(f"{failed or 'None'} of {len(outcomes)} steps failed. The report to send: {out}")
    return not failed


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the device is, and what drives it."""
    facts: dict[str, Any] = {"device": str(device), "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        return facts
    names = ("name", "total_memory", "major", "minor", "multi_processor_count")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["gpus"] = [{name: getattr(gpu, name) for name in names} for gpu in gpus]
    facts |= {"cudnn": torch.backends.cudnn.version(), "bfloat16": torch.cuda.is_bf16_supported()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used,power.limit", "--format=csv"]
    try:
        facts["nvidia-smi"] = subprocess.run(
            query, capture_output=True, encoding="utf8", errors="replace", timeout=30
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        facts["nvidia-smi"] = [str(error)]
    return facts


def _try(name: str, run: Callable[[], Found]) -> Outcome:
    start = time.perf_counter()
    status, error = "ok", None
    data: dict[str, Any] = {}
    try:
        note, data = run()
    except Skipped as reason:
        status, note = "not tried", str(reason)
    except Exception as raised:  # whatever it is, the report is for it
        status, note, error = "failed", f"{type(raised).__name__}: {raised}", traceback.format_exc()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Outcome(name, status, round(time.perf_counter() - start, 2), note, data, error)


def _show(outcomes: Sequence[Outcome], console: Console) -> None:
    colors = {"ok": "green", "failed": "red", "not tried": "yellow"}
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "outcome", "seconds", "note"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for one in outcomes:
        first = (one.note.splitlines() or [""])[0][:160]
        table.add_row(one.step, Text(one.status, colors[one.status]), f"{one.seconds:.1f}", first)
    console.print(table)
