"""Several processes of one run, as `accelerate launch` or `bench run --num-processes` start them.

Work is cut into parts by the configuration alone, and the processes share the parts, so that the composition of batches
(and with it every number, up to the order of sums) does not depend on how many processes there are. What trains is not
wrapped: the trainer sums one flat gradient. Where the processes share a network's frozen weights, each call of it waits
for all of them, and they work in step (`turns`). A single process is the special case in which nothing is exchanged.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from bench.errors import BenchError, NonFiniteError, OutOfMemoryError
from bench.runtime import memory

Part = TypeVar("Part", bound=Sized)
Value = TypeVar("Value")
# How processes share parts. free: each takes every count-th part, at its own speed. even: in step, at each turn parts
# of one length. alike: in step, and each computes every part, because what is called depends on what a part holds.
Pace = Literal["free", "even", "alike"]


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def state() -> PartialState:
    """accelerate's view of this process: its device and its place among the others."""
    # with cpu=True alone does it look for other processes on CPUs
    return PartialState(cpu=launched() and not torch.cuda.is_available())


def count() -> int:
    """Number of processes."""
    return state().num_processes


def is_main() -> bool:
    """Whether this process writes files and prints messages."""
    return state().is_main_process


def launch(number: int, arguments: Sequence[str]) -> int:
    """Run `bench` with the same arguments in several processes of this machine; the status of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failed process has said why
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        max_restarts=0,
        run_id="bench",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "bench", *arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:  # the processes have got it too, and written their checkpoint
        return 128 + error.sigval
    return 0


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process before the others, which find what it has written."""
    with state().main_process_first():
        yield


def from_main(compute: Callable[[], Value]) -> Value:
    """What `compute` gives in the main process, in all of them: they need not share a file system.

    A BenchError or OSError there is raised in all, so that none waits for a process that has ended.
    """
    value, error = None, None
    if is_main():
        try:
            value = compute()
        except (BenchError, OSError) as raised:
            error = raised
    found: list[Any] = [value, error]
    if count() > 1:
        broadcast_object_list(found)
    if found[1]:
        raise found[1]
    return cast(Value, found[0])


def turns(lengths: Sequence[int], pace: Pace, place: int, count: int) -> list[tuple[int, bool]]:
    """The parts that process `place` of `count` computes, in order: the number of each, and whether it counts.

    Every part counts in one process. In step, a process for which no part is left repeats one of the others', so that
    all processes have as many turns, and parts of equal length in each.
    """
    if pace == "free":
        return [(number, True) for number in range(place, len(lengths), count)]
    found, width = [], count if pace == "even" else 1
    for _, alike in groupby(range(len(lengths)), lengths.__getitem__):
        numbers = list(alike)
        for first in range(0, len(numbers), width):
            turn = numbers[first : first + width]
            found.append((turn[place], True) if place < len(turn) else (turn[0], False))
    return found


def share(parts: Sequence[Part], compute: Callable[[Part, bool], Value], pace: Pace = "free") -> dict[int, Value]:
    """What `compute` gives of the parts that count here, by their number; it also gets whether a part counts.

    Raises what `compute` raises, in all processes where `together` does.
    """
    own = turns([len(part) for part in parts], pace, state().process_index, count())
    if pace == "free":
        with together():
            return {number: compute(parts[number], True) for number, _ in own}
    found = {}
    try:
        for number, counts in own:
            with together(in_step=True):
                value = compute(parts[number], counts)
            if counts:
                found[number] = value
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise BenchError("another process of this run has ended, and has said why.") from error
    return found


def _is_lost(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def add(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the tensor's own device."""
    if count() == 1:
        return tensor
    total = tensor.to(state().device, copy=True)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def everywhere(here: bool) -> bool:
    """Whether `here` is true in every process."""
    return int(add(torch.tensor(int(here)))) == count()


def gather(value: Any) -> list[Any]:
    """A small value from every process, in their order."""
    return gather_object([value]) if count() > 1 else [value]


@contextmanager
def together(in_step: bool = False) -> Iterator[None]:
    """Raise an error of one process (NonFiniteError, OutOfMemoryError) in all, so that none waits for another.

    in_step: the processes wait for each other within the block. Where memory runs out there, this process ends at once,
    and the launcher ends the others. A NonFiniteError has to come after the last of these waits.
    """
    error: NonFiniteError | OutOfMemoryError | None = None
    try:
        with memory.phase():
            yield
    except NonFiniteError as raised:
        error = raised
    except OutOfMemoryError as raised:
        if in_step:
            raise
        error = raised
    errors = [one for one in gather(error) if one]
    if errors:
        raise error or errors[0]


def map_parts(
    parts: Sequence[Part],
    compute: Callable[[Part], dict[str, Tensor]],
    pace: Pace = "free",
    uncounted: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Tensor]:
    """`compute` over all parts, shared among the processes; the results, concatenated in order, on every process.

    compute: part → tensors by name, each with as many rows as the part. uncounted: the block in which a part is
    computed that counts in another process. Raises what `share` raises.
    """

    def compute_one(part: Part, counts: bool) -> dict[str, Tensor]:
        with nullcontext() if counts else uncounted():
            return compute(part)

    computed = share(parts, compute_one, pace)
    first = next(iter(computed.values()), {})
    if count() == 1:
        return {name: torch.cat([tensors[name] for tensors in computed.values()]) for name in first}
    shapes = [{name: (t.shape[1:], t.dtype) for name, t in first.items()}]
    broadcast_object_list(shapes)  # the first process always has a part
    lengths = [len(part) for part in parts]
    device, whole = state().device, {}
    for name, (shape, dtype) in shapes[0].items():
        rows = torch.zeros(sum(lengths), *shape, dtype=dtype, device=device).split(lengths)
        for number, tensors in computed.items():
            rows[number].copy_(tensors[name])
        whole[name] = add(torch.cat(rows))
    return whole
