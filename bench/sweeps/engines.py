"""Where a sweep's runs are computed: in processes of this machine, or on the nodes of a Ray cluster.

Both do the same with a run: `bench` with the run's arguments in a process that does nothing else. Nothing heavy is
imported here, so that a node's process has its number of threads before torch loads.
"""

import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from bench.errors import BenchError
from bench.runtime.files import locked
from bench.runtime.stopping import Interrupted

RETRIES = 3  # of a run whose node was lost
ENDING = 60  # seconds that a run may take for its last update and its checkpoint


def execute(arguments: Sequence[str], folder: Path, log: Path, environment: dict[str, str]) -> int:
    """`bench` with these arguments in this process, whose output goes to `log` from now on; its exit status.

    Of a sweep or a node that was lost, a process may still be ending in the run's folder; that is waited for.
    """
    for _ in range(ENDING):
        try:
            with locked(folder):
                break
        except BenchError:
            time.sleep(1)
    os.environ.update(environment)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["bench", *arguments]
    try:
        runpy.run_module("bench", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def thread_variables(threads: int) -> dict[str, str]:
    """Environment of a run; waiting threads that spin would slow the neighbouring process down."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


class Local:
    """Processes of this machine, forked from one that has imported everything: a run starts within a second.

    Each is a run's own, so that a crash costs one run, in a process group of its own: the terminal's signals reach it
    through `stop` alone.
    """

    def __init__(self, workers: int | None, threads: int, gpus: int):
        self.environment = thread_variables(threads)
        self.devices: list[str] = []
        self.gpus = gpus
        most = max(1, (os.cpu_count() or 1) // threads)
        if gpus:
            import torch

            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            self.devices = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
            if (most := len(self.devices) // gpus) < 1:
                raise BenchError(f"gpus = {gpus} a run: this machine has {len(self.devices)}.")
        self.slots = min(workers, most) if workers and gpus else workers or most
        self.runs: dict[int, tuple[BaseProcess, list[str]]] = {}  # by sentinel, with the GPUs it has

    def __enter__(self) -> "Local":
        self.context = multiprocessing.get_context("forkserver")
        # what planning has loaded, and a run; the command line looks at the terminal, so each run imports it for itself
        loaded = [name for name in sys.modules if re.match(r"bench\b(?!\.cli)", name)]
        self.context.set_forkserver_preload([*loaded, "bench.runs.run", "torch.utils.tensorboard"])
        self.before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)  # libraries read it when the server loads them
        return self

    def __exit__(self, *error: object) -> None:
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def start(self, arguments: Sequence[str], folder: Path, log: Path) -> int:
        """Begin a run; returns its handle."""
        mine, self.devices = self.devices[: self.gpus], self.devices[self.gpus :]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})
        process = self.context.Process(target=_child, args=(arguments, folder, log, environment))
        process.start()
        self.runs[process.sentinel] = process, mine
        return process.sentinel

    def wait(self, seconds: float) -> dict[int, int]:
        """Handle → exit status of the runs that have ended, as soon as there is one or after some seconds."""
        ended: dict[int, int] = {}
        for sentinel in cast(list[int], wait(list(self.runs), seconds)):
            process, devices = self.runs.pop(sentinel)
            process.join()
            self.devices += devices
            ended[sentinel] = cast(int, process.exitcode)  # it has ended
        return ended

    def stop(self, number: int) -> None:
        """Send the signal to all runs: at the first each writes its checkpoint and ends, at the second it ends."""
        for process, _ in self.runs.values():
            if process.is_alive():
                os.kill(cast(int, process.pid), number)


def _child(arguments: Sequence[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    sys.exit(execute(arguments, folder, log, environment))


def _end_with_sweep() -> None:
    """Stop this run, with its checkpoint, when the sweep's process is gone: it cannot pass a signal on any more."""
    cast(Any, multiprocessing.parent_process()).join()
    os.kill(os.getpid(), signal.SIGTERM)


class Ray:
    """The nodes of a Ray cluster, which share the sweep's folder and have this package installed.

    Ray places a run where the CPUs and GPUs that it declares are free, and starts it elsewhere if the node is lost;
    there it goes on from its last checkpoint.
    """

    def __init__(self, address: str | None, workers: int | None, threads: int, gpus: int):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unless the user wants it
        try:
            import ray
        except ImportError:
            raise BenchError("--on ray needs Ray: pip install 'nabla-bench[sweep]'") from None
        self.ray, self.address, self.slots = ray, address, workers or sys.maxsize
        resources = {"num_cpus": threads, "num_gpus": gpus, "max_retries": RETRIES, "max_calls": 1}
        self.task = ray.remote(**resources)(_on_node)
        self.environment = thread_variables(threads)
        self.runs: dict[Any, Path] = {}

    def __enter__(self) -> "Ray":
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.connected = not self.ray.is_initialized()
        if self.connected:
            try:
                self.ray.init(self.address, log_to_driver=False, logging_level="error", include_dashboard=None)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise BenchError(f"cannot reach the Ray cluster {self.address or ''}: {error}") from None
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return self

    def __exit__(self, *error: object) -> None:
        if self.connected:
            self.ray.shutdown()

    def start(self, arguments: Sequence[str], folder: Path, log: Path) -> Any:
        """Hand a run to the cluster; returns its handle."""
        reference = self.task.remote(arguments, folder, log, os.getcwd(), self.environment)
        self.runs[reference] = log
        return reference

    def wait(self, seconds: float) -> dict[Any, int]:
        """Handle → exit status of the runs that have ended, as soon as there is one or after some seconds."""
        ended = {}
        try:
            ready, _ = self.ray.wait(list(self.runs), timeout=seconds)
        except SystemError as error:  # Ray's compiled code lets our exception out as the cause of another
            raise (error.__cause__ if isinstance(error.__cause__, Interrupted) else error) from None
        for reference in ready:
            log = self.runs.pop(reference)
            try:
                ended[reference] = self.ray.get(reference)
            except self.ray.exceptions.TaskCancelledError:
                ended[reference] = 128 + signal.SIGINT
            except (self.ray.exceptions.RayError, OSError) as error:  # lost too often, or the node sees no such folder
                with log.open("a", encoding="utf8") as file:
                    file.write(f"\n{str(error).strip().splitlines()[-1]}\n")
                ended[reference] = 1
        return ended

    def stop(self, number: int) -> None:
        """Interrupt all runs; waiting ones do not begin."""
        for reference in self.runs:
            self.ray.cancel(reference)


def _on_node(arguments: Sequence[str], folder: Path, log: Path, place: str, environment: dict[str, str]) -> int:
    try:
        os.chdir(place)
    except OSError:
        raise FileNotFoundError(
            f"{socket.gethostname()} does not see {place}: all nodes must share the folder"
        ) from None
    return execute(arguments, folder, log, environment)
