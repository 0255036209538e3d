"""What a run survives, tried: `python -m tests.faults` prints the table of docs/contract.md (about ten minutes).

Every trial is a process of its own, forked from one that has imported everything. Something happens to it; then the
same command runs again undisturbed, and adapter, log and rows must equal those of a run that nothing happened to.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.cli import app
from results.rows import read_rows

SETTINGS = {
    "train.checkpoint_every": 1,
    "train.updates_per_round": 2,
    "evaluation.at": [2],
    "evaluation.samples_per_prompt": 64,
    "evaluation.metrics": ["reward", "path_kl"],
}
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")  # audit events of file operations
TIMES = ("seconds", "peak_memory", "wall", "revision", "dirty", "hardware", "packages")


@dataclass
class Fault:
    """One kind: what it is, how many trials, and what came of them."""

    name: str
    trials: int = 0
    outcomes: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def command(folder: Path, updates: int = 6) -> list[str]:
    """Arguments of a run of seconds."""
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["run", "--method", "nabla_gfn", "--model", "ring", "--updates", str(updates), "--out", str(folder), *sets]


def forked(
    arguments: list[str], before: Callable[[], None] = lambda: None, after: float | None = None
) -> tuple[int, str]:
    """Status and output of `bench` in a forked process; negative for a signal. after: seconds until SIGTERM."""
    with tempfile.TemporaryFile("w+") as said:
        if not (child := os.fork()):
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            before()
            os._exit(called(arguments))
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        _, found = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(found), said.read()


def called(arguments: list[str]) -> int:
    """Status of `bench` in this process; 70 for a traceback."""
    sys.argv, status = ["bench", *arguments], 70
    try:
        app()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    return status


def at_operation(folder: Path, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A hook: `act` before the number-th change of a file below the folder; 0: count, into `count` beside it."""

    def install() -> None:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
                return
            seen += 1
            if seen == number:
                act()
            if not number:
                (folder.parent / "count").write_text(str(seen))

        sys.addaudithook(hook)

    return install


def contents(folder: Path) -> dict[str, object]:
    """What must be equal to the bit: the adapter, every update's record and every row, times apart."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    frame = read_rows(folder / "rows.parquet")
    frame = frame[[c for c in frame if not any(word in c for word in TIMES) and c != "run"]]
    return {
        "adapter": {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()},
        "log": [{k: v for k, v in r.items() if not any(word in k for word in TIMES)} for r in records],
        "rows": frame.to_json(),
        "between": (folder / "rows-at-0000002.parquet").is_file(),
    }


def recovers(fault: Fault, folder: Path, straight: dict[str, object], label: str) -> None:
    """Run the same command again, and judge."""
    status, text = forked(command(folder))
    if status or "Traceback" in text:
        fault.broken.append(f"{label}: resumed with status {status}: {text[-500:]}")
        return
    found = contents(folder)
    if wrong := [name for name in straight if found[name] != straight[name]]:
        fault.broken.append(f"{label}: {', '.join(wrong)} differ")
    elif parts := [p for p in folder.rglob("*") if p.name.endswith((".part", ".partial"))]:
        fault.broken.append(f"{label}: left {parts}")
    else:
        fault.outcomes["finished to the bit"] += 1


def refused_well(status: int, text: str, folder: Path) -> bool:
    """One sentence that names a path, and no traceback."""
    return status in (1, 2) and "Traceback" not in text and "Error:" in text and str(folder) in text


def every(count: int, most: int) -> Iterator[int]:
    """1 to count, or so many of them evenly."""
    step = max(1, -(-count // most))
    yield from range(1, count + 1, step)


def killed_at_operations(scratch: Path, straight: dict, operations: int, most: int) -> Fault:
    """SIGKILL before a file operation."""
    fault = Fault("SIGKILL at a file operation of the run's folder")
    for number in every(operations, most):
        folder = scratch / "killed"
        status, text = forked(
            command(folder), at_operation(folder, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        )
        fault.trials += 1
        if status != -signal.SIGKILL:
            fault.broken.append(f"operation {number}: status {status}: {text[-300:]}")
        recovers(fault, folder, straight, f"operation {number}")
        shutil.rmtree(folder, ignore_errors=True)
    return fault


def failing(number: int) -> Callable[[], None]:
    """Raise an OSError of that number."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def failed_operations(scratch: Path, straight: dict, operations: int, most: int) -> Fault:
    """Each operation refused once, as a read-only or failing disk does."""
    fault = Fault("read-only disk: a file operation fails")
    for number in every(operations, most):
        folder = scratch / "failing"
        status, text = forked(command(folder), at_operation(folder, number, failing(errno.EROFS)))
        fault.trials += 1
        if status == 0:
            fault.outcomes["went on without it"] += 1
        elif not (status in (1, 2) and "Traceback" not in text and "Error:" in text):
            fault.broken.append(f"operation {number}: status {status}: {text[-1500:]}")
            continue
        recovers(fault, folder, straight, f"operation {number}")
        shutil.rmtree(folder, ignore_errors=True)
    return fault


def full_disk(scratch: Path, straight: dict, trials: int) -> Fault:
    """A small tmpfs with so many bytes left, then all of them."""
    fault = Fault("full disk (a small tmpfs)")
    disk = scratch / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode:
        fault.outcomes["not tried: no tmpfs can be mounted here"] += 1
        return fault
    try:
        whole = scratch / "straight"
        need = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
        for i in range(trials):
            folder, left = disk / "run", int(need * (i + 0.5) / trials)
            free = shutil.disk_usage(disk).free
            (disk / "ballast").write_bytes(bytes(max(0, free - left)))
            status, text = forked(command(folder))
            fault.trials += 1
            (disk / "ballast").unlink()
            if status and not refused_well(status, text, folder):
                fault.broken.append(f"{left} bytes left: status {status}: {text[-1500:]}")
            else:
                recovers(fault, folder, straight, f"{left} bytes left")
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return fault


def terminated(scratch: Path, straight: dict, trials: int) -> Fault:
    """SIGTERM at moments spread over a run."""
    fault = Fault("SIGTERM at any moment")
    start = time.monotonic()
    forked(command(scratch / "timed"))
    length = time.monotonic() - start
    for i in range(trials):
        folder = scratch / "terminated"
        status, text = forked(command(folder), after=length * (i + 0.5) / trials)
        fault.trials += 1
        if status not in (0, 143, -signal.SIGTERM) or "Traceback" in text:
            fault.broken.append(f"trial {i}: status {status}: {text[-1500:]}")
        fault.outcomes["status 143"] += status == 143
        recovers(fault, folder, straight, f"trial {i}")
        shutil.rmtree(folder, ignore_errors=True)
    return fault


def killed_launcher(scratch: Path) -> Fault:
    """SIGKILL of the process that launched two others; they must end too."""
    fault, folder = Fault("SIGKILL of a launcher of two processes"), scratch / "launched"
    arguments = [*command(folder, updates=100_000), "--num-processes", "2", "--set", "train.micro_batch=16"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while not ((folder / "log.jsonl").is_file() and (folder / "log.jsonl").read_text().count("\n") > 2):
        if time.monotonic() > end or launcher.poll() is not None:
            launcher.kill()
            fault.broken.append("the run did not start")
            return fault
        time.sleep(0.2)
    children = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    launcher.kill()
    launcher.wait()
    fault.trials = 1
    end = time.monotonic() + 60
    while (alive := [pid for pid in children if _alive(pid)]) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    if alive:
        fault.broken.append(f"{len(alive)} of {len(children)} workers lived on")
    else:
        fault.outcomes[f"its {len(children)} workers ended"] += 1
    return fault


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_faults(scratch: Path, most: int = 1000) -> list[Fault]:
    """Every kind, with at most so many trials each."""
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    folder = scratch / "straight"
    assert called(command(folder)) == 0  # here, so that what a run imports is imported once for all trials
    shutil.rmtree(folder)
    status, text = forked(command(folder), at_operation(folder, 0, lambda: None))
    assert status == 0, text
    straight, operations = contents(folder), int((scratch / "count").read_text())
    return [
        killed_at_operations(scratch, straight, operations, most),
        failed_operations(scratch, straight, operations, most),
        full_disk(scratch, straight, min(most, 20)),
        terminated(scratch, straight, min(most, 20)),
        killed_launcher(scratch),
    ]


def table(faults: list[Fault]) -> str:
    """In Markdown."""
    said = io.StringIO()
    said.write("| fault | trials | outcome |\n| --- | --- | --- |\n")
    for fault in faults:
        outcomes = [f"{count} {name}" for name, count in fault.outcomes.items() if count]
        outcomes += [f"**{len(fault.broken)} broken**"] * bool(fault.broken)
        said.write(f"| {fault.name} | {fault.trials} | {', '.join(outcomes)} |\n")
    return said.getvalue()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = all_faults(Path(place), *map(int, sys.argv[1:2]))
    print(table(found))
    for fault in found:
        for line in fault.broken:
            print(f"{fault.name}: {line}", file=sys.stderr)
    sys.exit(any(fault.broken for fault in found))
