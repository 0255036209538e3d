"""What is judged, found: an adapter or whole weights, in a file, a folder or a repository of the hub."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import config as configs
from bench.errors import BenchError
from bench.hub import Repository, hub_cache, reachable
from bench.models.folder import family_of, files_of, header, used_parts, weight_files
from bench.models.hub_pipeline import CONFIGURATIONS, WEIGHTS
from bench.runtime.digests import digest_contents
from bench.runtime.files import home_path

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
PEFT = ("adapter_config.json", "adapter_model.safetensors")
MARKS = ("lora", "dora_", "hada_", "lokr_", "oft_", "ia3_", "vera_")  # in the names of an adapter's tensors
ON_THE_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>.+))?")
PLAIN = ("adapter", "pytorch_lora_weights", "adapter_model", "unet", "transformer")  # names that tell nothing


@dataclass(frozen=True)
class Source:
    """Files that are judged.

    name: what rows call it. files: their names in the run's folder, and where they lie. whole: weights, no adapter.
    config: of the run of this suite that wrote it, or None.
    """

    name: str
    files: Mapping[str, Path]
    whole: bool
    config: Path | None = None

    @property
    def label(self) -> str:
        """A short name: of a repository its id, else of the file or folder."""
        return self.name.partition("@")[0]


def find(text: str) -> Source:
    """The source that a word of the command line names: a path, or `org/name[@revision][:file]` of the hub.

    Raises BenchError for what is not there, is pickled, or is several adapters.
    """
    path = home_path(text)
    if path.exists():
        named = path.with_suffix("") if path.is_file() else path.resolve()
        name = f"{named.resolve().parent.name}/{named.name}" if named.name in PLAIN else named.name
        return _in_folder(path, name) if path.is_dir() else _in_file(path, name)
    if not (match := ON_THE_HUB.fullmatch(text)):
        raise BenchError(f"there is no {text}: give a file, a folder, or a hub id (org/name, org/name@revision:file).")
    folder = _snapshot(match["name"], match["revision"] or "main", match["file"])
    name = f"{match['name']}@{folder.name}"
    if file := match["file"]:
        return _in_file(folder / file, f"{name}:{file}")
    return _in_folder(folder, name)


def digest(sources: Sequence[Source]) -> str:
    """Of all contents, wherever they lie."""
    return digest_contents({f"{i}/{file}": path for i, one in enumerate(sources) for file, path in one.files.items()})


def stage(sources: Sequence[Source], folder: Path) -> None:
    """Put the sources into `folder`, a numbered folder each: adapters as copies, whole weights as links."""
    for number, source in enumerate(sources):
        for name, path in source.files.items():
            place = folder / str(number) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            if source.whole:
                place.symlink_to(path.resolve())
            else:
                shutil.copyfile(path, place)


def staged(folder: Path) -> list[Source]:
    """What `stage` has put into `folder`. Raises BenchError if there is nothing."""
    places = sorted(folder.iterdir(), key=lambda path: int(path.name)) if folder.is_dir() else []
    if not places:
        raise BenchError(f"{folder} holds no weights: bench judge SOURCE puts them there and measures them.")
    files = [
        {str(path.relative_to(place)): path for path in sorted(place.rglob("*")) if path.is_file()} for place in places
    ]
    return [Source(place.name, names, False) for place, names in zip(places, files, strict=True)]


def _in_file(path: Path, name: str) -> Source:
    if not path.is_file():
        raise BenchError(f"there is no file {path}.")
    if path.suffix in PICKLED:
        raise BenchError(f"{path} is pickled, which is never loaded: convert it to .safetensors.")
    if path.suffix != ".safetensors":
        raise BenchError(f"{path} is no .safetensors file: give an adapter, whole weights, or a folder of them.")
    return Source(name, {path.name: path}, whole=not is_adapter(path))


def is_adapter(file: Path) -> bool:
    """Whether the names of a file's tensors are an adapter's, and not those of whole weights."""
    names = header(file).keys()
    return not names or any(mark in name for name in names for mark in MARKS)


def _in_folder(folder: Path, name: str) -> Source:
    if (folder / "config.yaml").is_file():
        return _of_run(folder, name)
    if (folder / "model_index.json").is_file():
        parts = used_parts(folder, family_of(folder))
        weights = [part for part in parts if not part.startswith("tokenizer")]
        files = ["model_index.json", *(file for part in weights for file in files_of(folder, part))]
        return Source(name, _present(folder, [*files, *_indices(folder)]), whole=True)
    if (folder / "config.json").is_file():
        return Source(name, _present(folder, ["config.json", *weight_files(folder), *_indices(folder)]), whole=True)
    if all((folder / file).is_file() for file in PEFT):
        return Source(name, _present(folder, PEFT), whole=False)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BenchError(f"{folder} holds several adapters ({names}): name one, {folder}/{found[0].name} for example.")
    if not found:
        pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
        reason = f"{pickled[0]} is pickled, which is never loaded: convert it to" if pickled else "there is no"
        raise BenchError(f"{folder} holds no adapter and no weights of a model: {reason} .safetensors.")
    return _in_file(found[0], name)


def _of_run(folder: Path, name: str) -> Source:
    """The evaluated adapter of a run of this suite, or such an adapter alone."""
    config = configs.read(folder / "config.yaml")
    place = folder / config.adapter_name()
    place = place if place.is_dir() else folder
    files = sorted(path for path in place.rglob("*") if path.suffix in (".safetensors", ".json"))
    files = [path for path in files if path.parent != folder or path.suffix == ".safetensors"]
    if not files:
        raise BenchError(f"{folder} holds a run without an adapter: it is not finished, or it trains nothing.")
    return Source(name, {str(path.relative_to(place)): path for path in files}, False, folder / "config.yaml")


def _indices(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.glob("**/*.safetensors.index.json"))]


def _present(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files by name. Raises BenchError for one that is not there."""
    if absent := [name for name in names if not (folder / name).is_file()]:
        pickled = [path.name for path in sorted((folder / absent[0]).parent.glob("*")) if path.suffix in PICKLED]
        hint = f"; {pickled[0]} is pickled, which is never loaded: convert it" if pickled else ""
        raise BenchError(f"{folder / absent[0]} is missing{hint}.")
    return {name: folder / name for name in names}


def _snapshot(name: str, revision: str, file: str | None) -> Path:
    """The folder of a repository in the hub's cache, after what it needs has been fetched, if the hub answers."""
    if reachable():
        repository = Repository(name, (), revision=revision)
        repository.snapshot([file] if file else CONFIGURATIONS)
        if not file:
            index = _cached(name, revision) / "model_index.json"
            repository.snapshot(WEIGHTS if index.is_file() else ("*.json", "*.safetensors"))
    return _cached(name, revision)


def _cached(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=hub_cache(), local_files_only=True))
    except LocalEntryNotFoundError:
        raise BenchError(
            f"{name} at {revision} is not in {hub_cache()}, and the hub cannot be reached: where there is "
            f"a network, `hf download {name}` fetches it; or is a local path meant that is not there?"
        ) from None
