"""Running out of memory: the errors of all libraries become one that says what was being computed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

from bench.errors import OutOfMemoryError

# messages that accelerate does not list: the driver's, and those of libraries with allocators of their own
OTHER_MESSAGES = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def phase(name: str | None = None) -> Iterator[None]:
    """Turn a failed allocation in the block into an OutOfMemoryError; every phase that it passes adds its name."""
    try:
        yield
    except OutOfMemoryError as error:
        if name and error.phases[:1] != (name,):
            error.phases = (name, *error.phases)
        raise
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        named = OutOfMemoryError(f"out of memory{_requested_size(str(error))}")
        named.phases = (name,) if name else ()
        raise named from error


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return any(message in str(error) for message in OTHER_MESSAGES)


def _requested_size(message: str) -> str:
    """` (2.50 GiB asked for)`, if the message of an allocator says it."""
    match = re.search(r"tried to allocate ([\d.]+) (\w+)", message, re.IGNORECASE)
    if not match:
        return ""
    number, unit = match.groups()
    size = f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else f"{number} {unit}"
    return f" ({size} asked for)"


def available(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a device's memory; None where they are unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    path = Path("/proc/meminfo")
    if device.type != "cpu" or not path.is_file():
        return None
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (s.partition(":") for s in path.open(encoding="utf8"))
    }
    return sizes["MemAvailable"], sizes["MemTotal"]
