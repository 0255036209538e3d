"""Files of a pipeline's folder, in diffusers' layout. Nothing is loaded; torch is imported for tensors alone."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import registry
from bench.errors import BenchError

if TYPE_CHECKING:
    from torch import Tensor

    from bench.models.family import Family

LFS = b"version https://git-lfs"


def read(path: Path) -> dict[str, Any]:
    """A JSON object of a pipeline. Raises BenchError."""
    try:
        data = path.read_bytes()
        if data.startswith(LFS):
            raise ValueError("it is a Git LFS pointer: run `git lfs pull` there")
        tree = json.loads(data)
        if not isinstance(tree, dict):
            raise ValueError(f"it holds no JSON object but {tree!r:.40}")
        return tree
    except FileNotFoundError:
        raise BenchError(f"{path} is missing: copy or fetch the pipeline anew.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"cannot read {path}: {error}.") from None


def family_of(folder: Path) -> "type[Family]":
    """The family that reads a pipeline's folder, by the class that `model_index.json` names.

    Raises BenchError for a folder without one, or a class that no family reads.
    """
    path, supported = folder / "model_index.json", list(registry.plugins("pipelines"))
    name = read(path).get("_class_name")
    if name not in supported:
        raise BenchError(f"{path}: _class_name = {name!r} is not supported; supported are {', '.join(supported)}.")
    return registry.load("pipelines", name)


def used_parts(folder: Path, family: "type[Family]", t5: bool = True) -> dict[str, str]:
    """The class of every part that the family loads. Raises BenchError for a part that it has no place for.

    t5: with the parts that the family can do without.
    """
    path, pipeline = folder / "model_index.json", family.pipeline_class.__name__
    parts, left_out = {}, {*family.unused, *(() if t5 else family.optional)}
    options = {name for name, one in inspect.signature(family.pipeline_class).parameters.items() if one.default is None}
    places = {*family.parts, *(name for name, value in family.unused.items() if value is None)}
    for name, entry in read(path).items():
        if (entry is None and name not in options - places) or (
            name in places and not (isinstance(entry, list) and len(entry) == 2)
        ):  # diffusers fails
            raise BenchError(
                f"{path}: {name} = {json.dumps(entry)}; a part is written [library, class], one that is left out "
                "[null, null]."
            )
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None] or name in left_out:
            continue
        readable = family.parts.get(name, ())
        library, class_name = entry if len(entry) == 2 else (None, None)
        if class_name not in readable or library not in ("diffusers", "transformers"):
            can = f"it can be {', '.join(readable)}" if readable else (
                f"the parts of this family are {', '.join(family.parts)}"
            )  # fmt: skip
            raise BenchError(f"{path}: {name} = {entry!r} cannot be read by {pipeline} here; {can}.")
        parts[name] = class_name
    if absent := family.parts.keys() - parts.keys() - family.optional:
        raise BenchError(f"{path} names no {', '.join(sorted(absent))}, which {pipeline} needs.")
    for encoder in (part for part in parts if part.startswith("text_encoder")):
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        if tokenizer in family.parts and tokenizer not in parts:
            raise BenchError(f"{path} names {encoder} and no {tokenizer}: copy the pipeline anew, or leave both out.")
    return parts


def files_of(folder: Path, part: str) -> list[str]:
    """Names of a part's files inside `folder`; of weights in several files, if their index is here already."""
    if part == "scheduler":
        return ["scheduler/scheduler_config.json"]
    if part.startswith("tokenizer"):
        return [f"{part}/tokenizer_config.json"]
    return [f"{part}/{file}" for file in ("config.json", *weight_files(folder / part))]


def weight_files(folder: Path) -> list[str]:
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    places = read(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise BenchError(f"cannot read {index}: it has no weight_map.")
    return sorted(set(places.values()))


def headers(folder: Path) -> "dict[str, Tensor]":
    """The tensors in the safetensors files of a part's folder, without their contents."""
    return {name: tensor for file in weight_files(folder) for name, tensor in header(folder / file).items()}


def header(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, without their contents. Raises BenchError for a file that is none."""
    import torch
    from safetensors import SafetensorError, safe_open

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}  # others count as float32
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: torch.empty(part.get_shape(), dtype=dtypes.get(part.get_dtype()), device="meta")
                for name, part in slices.items()
            }
    except FileNotFoundError:
        pickled = "; pickled weights (.bin) are not loaded" if list(path.parent.glob("*.bin")) else ""
        raise BenchError(f"{path} is missing{pickled}.") from None
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(LFS)) == LFS
        reason = "it is a Git LFS pointer: run `git lfs pull` there" if pointer else f"not a whole file ({error})"
        raise BenchError(f"cannot read the weights {path}: {reason}.") from None
