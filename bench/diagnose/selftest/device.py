"""A device that exists only in tests: it computes on the CPU, keeps CUDA's rules, and counts what makes a GPU wait.

Every tensor "on" it is a wrapper around a CPU tensor. torch sees a device of its own kind (its private-use backend, for
which autograd, factories, `.to` and `module.to` work as for any other), so nothing of the code under test is replaced,
and every operation passes through `_run`. Values exist, so branches on data run; that is what torch's fake tensors
cannot do. The rules are those of CUDA: operands of one kernel lie on one device, 0-dimensional CPU numbers in
elementwise operations excepted; an index tensor from the CPU is copied; generators lie where the numbers go.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

from bench.diagnose.selftest.checking import Skipped
from bench.environment import ROOT

NAME = "pretend"
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize"}
READS = {"aten::_local_scalar_dense", "aten::equal"}  # bring a number to the host
SIZES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
SCALARS = {"aten::where", "aten::masked_fill", "aten::masked_fill_", "aten::fill_", "aten::addcmul", "aten::addcdiv"}


@dataclass
class Ledger:
    """What happened on the device, by source line.

    synchronisations: the host waited for what was queued: a value was read, or a size depended on one. uploads: copies
    to the device; waits: those of them that were not said to be `non_blocking`. downloads are synchronisations too.
    faults: what CUDA refuses, found in a backward pass, where this device cannot raise.
    """

    synchronisations: Counter = field(default_factory=Counter)
    uploads: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    downloads: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """The lines that synchronise or copy, most often first."""
        kinds = {"synchronises": self.synchronisations, "waits for a copy": self.waits}
        return "; ".join(f"{place} {kind} {n} ×" for kind, found in kinds.items() for place, n in found.most_common())


_ledgers: list[Ledger] = []


class _Pretended(Tensor):
    """A tensor on the device; `raw` is the CPU tensor behind it."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @staticmethod
    def __new__(cls, raw: Tensor) -> "_Pretended":
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=torch.device(f"{NAME}:0")
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(operation, args, kwargs or {})


class _Entries(TorchFunctionMode):
    """What torch's dispatcher does not see: constants from data, lists as indices, texts, the setter of `.data`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and _is_ours(kwargs.get("device")):
            device = kwargs.pop("device")
            here = _each(lambda x: x.cpu() if isinstance(x, _Pretended) else x, args)  # in lists, that is
            return function(*here, **kwargs).to(device)
        if function is torch.arange and _is_ours(kwargs.get("device")):  # torch would resize a wrapper
            return _Pretended(function(*args, **kwargs | {"device": "cpu"}))
        if function in (Tensor.tolist, Tensor.__format__, Tensor.__repr__) and isinstance(args[0], _Pretended):
            return function(args[0].cpu(), *args[1:])
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], _Pretended):
            args = args[0], _index(args[1], args[0].device), *args[2:]
        result = function(*args, **kwargs)
        if function == vars(torch._C.TensorBase)["data"].__set__ and isinstance(args[0], _Pretended):
            args[0].raw = args[1].raw
        return result


def _index(key: Any, place: torch.device) -> Any:
    """An index whose lists of numbers are tensors where the data lie, as CUDA makes of them."""
    if isinstance(key, tuple):
        return tuple(_index(part, place) for part in key)
    if isinstance(key, (list, range)) and all(isinstance(x, (int, list)) for x in key):
        return torch.tensor(list(key), dtype=None if len(key) else torch.long).to(place)
    return key


class _Module:
    """What torch asks of a device's own module; it is not `available`, so that nothing chooses it by itself."""

    is_available = is_initialized = staticmethod(lambda: False)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.empty(0, dtype=torch.uint8))  # it draws on the CPU
    set_rng_state = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


def device() -> torch.device:
    """The device, made on first use; it stays for the life of the process. Raises Skipped where torch is too old."""
    _backend()
    return torch.device(NAME, 0)


@cache
def _backend() -> torch.library.Library:
    """Make torch know the device; the cache keeps the library, which unregisters when it is collected."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        raise Skipped(f"torch {torch.__version__} has no backends in Python; a newer one has")
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    return library


@contextmanager
def recording() -> Iterator[Ledger]:
    """Count synchronisations and copies inside the block. Raises RuntimeError at its end for faults not raised yet."""
    ledger = Ledger()
    _ledgers.append(ledger)
    try:
        with _Entries(), torch.autograd.set_multithreading_enabled(False):  # modes belong to a thread
            yield ledger
    finally:
        _ledgers.remove(ledger)
    if ledger.faults:
        raise RuntimeError(ledger.faults[0])


def _is_ours(where: Any) -> bool:
    return where is not None and torch.device(where).type == NAME


def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation on the CPU tensors behind its arguments, after the checks that CUDA would make."""
    inputs = [x for x in _leaves((*args, *kwargs.values())) if isinstance(x, Tensor)]
    ours = [x for x in inputs if isinstance(x, _Pretended)]
    target = kwargs.get("device")
    _check(operation, args, kwargs, inputs, bool(ours))
    plain = _each(_plain, args)
    if operation.name() in ("aten::_copy_from", "aten::_copy_from_and_resize"):
        plain[1].copy_(plain[0])
        return args[1]
    result = operation(*plain, **{name: _each(_plain, value) for name, value in kwargs.items()})
    returns = operation._schema.returns
    if returns and returns[0].alias_info and returns[0].alias_info.is_write:  # in place, or into `out`
        return kwargs.get("out", args[0] if args else None)
    if _is_ours(target) or (target is None and ours):
        # a wrapper does not say that its tensor is to be read conjugated, as complex views in a backward pass are
        return _each(lambda x: _Pretended(x.resolve_conj()) if isinstance(x, Tensor) else x, result)
    return result


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What lists and tuples hold, and these may hold others: all that arguments of operations are."""
    for value in values:
        if type(value) in (list, tuple):
            yield from _leaves(value)
        else:
            yield value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of a value, or of all that a list or tuple holds; torch's own trees took a third of the tests' time."""
    return type(value)(_each(change, x) for x in value) if type(value) in (list, tuple) else change(value)


def _plain(x: Any) -> Any:
    if isinstance(x, _Pretended):
        return x.raw
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _check(operation: Any, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor], ours: bool) -> None:
    """Refuse what CUDA refuses; note what makes it wait."""
    name, target = operation.name().partition(".")[0], kwargs.get("device")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME and (ours or _is_ours(target)):
        _refuse(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    if name in COPIES:
        _note_copy(name, args, kwargs)
        return
    if name in READS or name in SIZES:
        _note("synchronisations")
    foreign = [x for x in inputs if not isinstance(x, _Pretended)]
    if not (ours and foreign) and name not in INDEXING:
        return
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if isinstance(args[0], _Pretended):
            for index in indices:
                if not isinstance(index, _Pretended):
                    _note("uploads", "waits")
                if index.dtype in (torch.bool, torch.uint8):
                    _note("synchronisations")
            foreign = [x for x in foreign if all(x is not index for index in indices)]
        foreign = [x for x in foreign if x.ndim or x is args[0]]
    elif name in SCALARS or torch.Tag.pointwise in operation.tags:
        foreign = [x for x in foreign if x.ndim]
    if ours and foreign:
        _refuse(
            f"Expected all tensors to be on the same device, but {name} got {NAME}:0 and cpu "
            f"(a CPU tensor of shape {tuple(foreign[0].shape)}, at {_place()})"
        )


def _refuse(message: str) -> None:
    if torch._C._current_graph_task_id() == -1:
        raise RuntimeError(message)
    for ledger in _ledgers:
        ledger.faults.append(message)


def _note_copy(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    queued = kwargs.get("non_blocking", False) or (name != "aten::_to_copy" and len(args) > 2 and args[2])
    if name == "aten::_to_copy":
        target = kwargs.get("device")
        source, to_us = args[0], isinstance(args[0], _Pretended) if target is None else _is_ours(target)
    else:
        source, destination = (args[0], args[1]) if name.startswith("aten::_copy_from") else (args[1], args[0])
        to_us = isinstance(destination, _Pretended)
    from_us = isinstance(source, _Pretended)
    if to_us and not from_us:
        _note("uploads", *(() if queued else ("waits",)))
    elif from_us and not to_us:
        _note("downloads", "synchronisations")


def _note(*kinds: str) -> None:
    for ledger in _ledgers:
        for kind in kinds:
            getattr(ledger, kind)[_place()] += 1


def _place() -> str:
    """The innermost line of this project, or else of whoever is not torch, that is being run."""
    frame: FrameType | None = sys._getframe(1)
    other = None
    while frame:
        path, line = frame.f_code.co_filename, frame.f_lineno
        if path.startswith(f"{ROOT}/") and "site-packages" not in path and path != __file__:
            return f"{path.removeprefix(f'{ROOT}/')}:{line}"
        if other is None and "/torch/" not in path and path != __file__:
            other = f"{path}:{line}"
        frame = frame.f_back
    return other or "?"
