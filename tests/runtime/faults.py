"""What a run survives, tried: `python -m tests.runtime.faults` prints the tables of docs/contract.md
(about forty minutes).

`python -m tests.runtime.faults MODEL [MOST]` tries one of `RUNS` alone, with at most so many trials of a kind.

Every trial is a process of its own, forked from one that has imported everything. Something happens to it; then the
same command runs again undisturbed, and adapter, images, log and rows must equal those of a run that nothing happened
to.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.cli.app import app
from bench.reporting.rows import read_rows

# Of seconds, with an evaluation between. `emoji` writes images, a model card and a pipeline's adapter as well.
RUNS = {
    "ring": {
        "train.updates": 6,
        "train.updates_per_round": 2,
        "evaluation.at": [2],
        "evaluation.samples_per_prompt": 64,
    },
    "emoji": {
        "train.updates": 2,
        "train.updates_per_round": 1,
        "train.prompts_per_round": 1,
        "train.samples_per_prompt": 2,
        "evaluation.at": [1],
        "evaluation.samples_per_prompt": 2,
        "evaluation.rewards": [],
        "method.channels": [32, 32],
        "sampler.steps": 2,
        "prompts.limit": 5,
    },
}
REWARDS = {"ring": "quadratic", "emoji": "colorfulness"}
EVERY = {
    "train.threads": 1,  # a forked process waits for ever for threads that its parent had
    "train.checkpoint_every": 1,
    "evaluation.metrics": ["reward", "path_kl"],
}
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")  # audit events of file operations
TIMES = ("seconds", "peak_memory", "wall", "revision", "dirty", "hardware", "packages")

SIGNALLED = {143: "status 143", 0: "were finished", -signal.SIGTERM: "had not begun"}


@dataclass
class Fault:
    """One kind: what it is, how many trials, and what came of them."""

    name: str
    trials: int = 0
    outcomes: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


@dataclass
class Tried:
    """The run that faults happen to; what an undisturbed one leaves, and how often it changes files."""

    model: str
    scratch: Path
    straight: dict[str, object] = field(default_factory=dict)
    operations: int = 0

    def command(self, folder: Path, changes: Mapping[str, object] = {}) -> list[str]:
        """Arguments of `bench`."""
        settings = RUNS[self.model] | EVERY | dict(changes)
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        return ["run", "nabla_gfn", "--model", self.model, "--reward", REWARDS[self.model], "--out", str(folder), *sets]

    def begin(self) -> None:
        """The undisturbed run."""
        folder = self.scratch / "straight"
        assert called(self.command(folder)) == 0  # here, so that what a run imports is imported once for all trials
        shutil.rmtree(folder)
        status, text = forked(self.command(folder), at_operation(folder, 0, lambda: None))
        assert status == 0, text
        self.straight, self.operations = contents(folder), int((self.scratch / "count").read_text())

    def recovers(self, fault: Fault, folder: Path, label: str) -> None:
        """Run the same command again, judge what it leaves, and clear it away."""
        status, text = forked(self.command(folder))
        found = contents(folder) if not status else {}
        if status or "Traceback" in text:
            fault.broken.append(f"{label}: resumed with status {status}: {text[-500:]}")
        elif wrong := [name for name in self.straight if found[name] != self.straight[name]]:
            fault.broken.append(f"{label}: {', '.join(wrong)} differ")
        elif parts := [p for p in folder.rglob("*") if p.name.endswith((".part", ".partial"))]:
            fault.broken.append(f"{label}: left {parts}")
        else:
            fault.outcomes["finished to the bit"] += 1
        shutil.rmtree(folder, ignore_errors=True)


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
    """What must be equal to the bit: adapter, images, every update's record and every row, times apart."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    tables = {path.name: read_rows(path) for path in folder.glob("rows*.parquet")}
    timed = [c for frame in tables.values() for c in frame if c == "run" or any(word in c for word in TIMES)]
    return {
        "adapter": {p.name: p.read_bytes() for p in (folder / "adapter").glob("*.safetensors")},
        "images": {p.name: p.read_bytes() for p in (folder / "images").glob("*")},
        "log": [{k: v for k, v in r.items() if not any(word in k for word in TIMES)} for r in records],
        "rows": {name: frame.drop(columns=timed, errors="ignore").to_json() for name, frame in tables.items()},
    }


def refused_well(status: int, text: str, folder: Path) -> bool:
    """One sentence that names a path, and no traceback."""
    return status in (1, 2) and "Traceback" not in text and "Error:" in text and str(folder) in text


def every(count: int, most: int) -> Iterator[int]:
    """1 to count, or so many of them evenly."""
    step = max(1, -(-count // most))
    yield from range(1, count + 1, step)


def killed_at_operations(run: Tried, most: int) -> Fault:
    """SIGKILL before a file operation."""
    fault, folder = Fault("SIGKILL at a file operation of the run's folder"), run.scratch / "killed"
    for number in every(run.operations, most):
        kill = at_operation(folder, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        status, text = forked(run.command(folder), kill)
        fault.trials += 1
        if status != -signal.SIGKILL:
            fault.broken.append(f"operation {number}: status {status}: {text[-300:]}")
        run.recovers(fault, folder, f"operation {number}")
    return fault


def failing(number: int) -> Callable[[], None]:
    """Raise an OSError of that number."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def failed_operations(run: Tried, most: int) -> Fault:
    """Each operation refused once, as a read-only or failing disk does."""
    fault, folder = Fault("read-only disk: a file operation fails"), run.scratch / "failing"
    for number in every(run.operations, most):
        status, text = forked(run.command(folder), at_operation(folder, number, failing(errno.EROFS)))
        fault.trials += 1
        if status == 0:
            fault.outcomes["went on without it"] += 1
        elif not (status in (1, 2) and "Traceback" not in text and "Error:" in text):
            fault.broken.append(f"operation {number}: status {status}: {text[-1500:]}")
        run.recovers(fault, folder, f"operation {number}")
    return fault


def full_disk(run: Tried, most: int) -> Fault:
    """A small tmpfs with so many bytes left, then all of them."""
    fault, disk, trials = Fault("full disk (a small tmpfs)"), run.scratch / "disk", min(most, 20)
    need = sum(p.stat().st_size for p in (run.scratch / "straight").rglob("*") if p.is_file())
    disk.mkdir()
    size = f"size={3 * need}"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]).returncode:
        fault.outcomes["not tried: no tmpfs can be mounted here"] += 1
        return fault
    try:
        for i in range(trials):
            folder, left = disk / "run", int(need * (i + 0.5) / trials)
            free = shutil.disk_usage(disk).free
            (disk / "ballast").write_bytes(bytes(max(0, free - left)))
            status, text = forked(run.command(folder))
            fault.trials += 1
            (disk / "ballast").unlink()
            if status and not refused_well(status, text, folder):
                fault.broken.append(f"{left} bytes left: status {status}: {text[-1500:]}")
            run.recovers(fault, folder, f"{left} bytes left")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return fault


def terminated(run: Tried, most: int) -> Fault:
    """SIGTERM at moments spread over a run."""
    fault, folder, trials = Fault("SIGTERM at any moment"), run.scratch / "terminated", min(most, 20)
    start = time.monotonic()
    forked(run.command(run.scratch / "timed"))
    length = time.monotonic() - start
    for i in range(trials):
        status, text = forked(run.command(folder), after=length * (i + 0.5) / trials)
        fault.trials += 1
        if status not in SIGNALLED or "Traceback" in text:
            fault.broken.append(f"trial {i}: status {status}: {text[-1500:]}")
        else:
            fault.outcomes[SIGNALLED[status]] += 1
        run.recovers(fault, folder, f"trial {i}")
    return fault


def killed_launcher(run: Tried, most: int) -> Fault:
    """SIGKILL of the process that launched two others; they must end too."""
    fault, folder = Fault("SIGKILL of a launcher of two processes"), run.scratch / "launched"
    arguments = [*run.command(folder, {"train.updates": 100_000, "train.micro_batch": 1}), "--num-processes", "2"]
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


FAULTS = (killed_at_operations, failed_operations, full_disk, terminated, killed_launcher)


def table(model: str, faults: list[Fault]) -> str:
    """In Markdown."""
    said = io.StringIO()
    said.write(f"| fault, to a run on `{model}` | trials | outcome |\n| --- | --- | --- |\n")
    for fault in faults:
        outcomes = [f"{count} {name}" for name, count in fault.outcomes.items() if count]
        outcomes += [f"**{len(fault.broken)} broken**"] * bool(fault.broken)
        said.write(f"| {fault.name} | {fault.trials} | {', '.join(outcomes)} |\n")
    return said.getvalue()


def main(model: str | None = None, most: str = "1000") -> None:
    """Try every fault on one model's run, or on every model's; exit with status 1 if something broke."""
    broken = []
    for name in [model] if model else RUNS:
        with tempfile.TemporaryDirectory() as place:
            os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
            run = Tried(name, Path(place))
            run.begin()
            found = [fault(run, int(most)) for fault in FAULTS]
        print(table(name, found), flush=True)
        broken += [f"{name}: {fault.name}: {line}" for fault in found for line in fault.broken]
    print(*broken, sep="\n", file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main(*sys.argv[1:])
