"""Running out of memory: the many ways in which libraries say so become one error that knows what was being done."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.errors import OutOfMemoryError

# besides torch.OutOfMemoryError: the CPU's allocator, the driver, and libraries that allocate by themselves
WORDS = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


@contextmanager
def phase(name: str | None = None) -> Iterator[None]:
    """Raise an allocation that fails in the block as an OutOfMemoryError; every phase that it leaves adds its name."""
    try:
        yield
    except OutOfMemoryError as error:
        if name and error.phases[:1] != (name,):
            error.phases = (name, *error.phases)
        raise
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(w in str(error) for w in WORDS):
            raise
        shortage = OutOfMemoryError(f"out of memory{_asked(str(error))}")
        shortage.phases = (name,) if name else ()
        raise shortage from error


def _asked(message: str) -> str:
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", message, re.IGNORECASE)
    if not found:
        return ""
    number, unit = found.groups()
    size = f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else f"{number} {unit}"
    return f" ({size} asked for)"


def available(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a device's memory; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    path = Path("/proc/meminfo")
    if device.type != "cpu" or not path.is_file():
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (s.partition(":") for s in path.open())}
    return sizes["MemAvailable"], sizes["MemTotal"]
