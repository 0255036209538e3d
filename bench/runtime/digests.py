"""Keys by which things are stored, found again and compared.

Whatever can change the value of a thing is a part of its key:

- a prior's fingerprint (`PipelineModel.fingerprint`): weights, configurations and tokenizers of all its parts, the
  options of the pipeline, precision, quantisation, negative prompt, guidance; of an analytic model its means, schedule
  and precision;
- a set of prior samples (`Evaluator.prior_set`): fingerprint, kernel, names of the samples, seed and purpose of their
  noise, and what decides how it is rounded: batch, attention, compilation, slicing, device, versions of libraries;
- a set of a judged model (`bench judge`): that of the prior's set, and the contents and scales of its weights;
- rewards of the prior's samples (`Evaluator.prior_rewards`): the set, and of each reward its code, its options, the
  contents of files that they name, its weights and its batch;
- features (`Evaluator.features`): images with shape and type, the space and its weights, and again what decides how
  they are rounded;
- embeddings of a prompt (`PromptStore`): contents of the text encoders' and tokenizers' files, the pipeline's index,
  precision, device, versions of libraries, the prompt, guidance and the latent's shape;
- a run's configuration (`RunConfig.hash`): all settings that change more than rounding;
- what an evaluation samples (`evaluation_id`): its settings, its sampler, the prompts; model and seed stand beside it;
- a set of prompts (`PromptSet.digest`): the prompts, their split, and the other columns of their file;
- an answer of the reward `vlm`: endpoint, model, scale, the question with the prompt in it, pixels and size;
- what lies behind a setting that names files (`bench.runs.contents`): names and contents of the files.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

KINDS = {".safetensors", ".json", ".txt", ".model", ".jinja", ".bin", ".pt", ".pth", ".tar"}  # what a program reads


def digest(parts: Mapping[str, Any] | Sequence[Any], size: int = 16) -> str:
    """`2 * size` hex digits of what JSON can hold, the same in any order of a mapping's keys; else TypeError."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=size).hexdigest()


def source_of(cls: type) -> str:
    """The source of a class and of what is beside it in its file; empty where there is none, as in a console."""
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (KeyError, OSError, TypeError):
        return ""


def digest_files(path: Path) -> str:
    """Of a file's contents, or of all weights, configurations and vocabularies below a folder with their names.

    The digest of a file in the hub's cache is the name of its blob, a hash of its contents. Others are read, once.
    """
    files = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.suffix in KINDS}
    total = hashlib.blake2b(digest_size=16)
    for name, file in (files if path.is_dir() else {"": path}).items():
        real = file.resolve()
        if real.is_file():
            stat, blob = real.stat(), real.parent.name == "blobs"
            contents = real.name if blob else _digest_file(real, stat.st_mtime_ns, stat.st_size)
            total.update(f"{name}={contents};".encode())
    return total.hexdigest()


def digest_contents(files: Mapping[str, Path]) -> str:
    """Of files' names and contents, wherever they lie: all of them are read."""
    stats = {name: path.resolve().stat() for name, path in files.items()}
    contents = {name: _digest_file(path.resolve(), s.st_mtime_ns, s.st_size)
                for (name, path), s in zip(files.items(), stats.values(), strict=True)}  # fmt: skip
    return digest(contents)


@cache
def _digest_file(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
