"""Files that a setting needs and the project does not ship: where they are, what is missing, how to get it.

Everything is looked up in the local cache first. The hub is asked for missing files alone, after one short probe: its
client retries for half a minute before it says that there is no network.
"""

import io
import os
import shlex
import shutil
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.progress import wrap_file

from bench.errors import BenchError
from bench.runtime.digests import digest_files
from bench.runtime.files import home_path, unpack, write_atomic

PROBE_SECONDS = 3
# size → the revision that bench.models.random_weights writes: no real commit is called so
RANDOM = {"full": "0" * 40, "tiny": "0" * 39 + "1"}


class Requirement(Protocol):
    """Files that must be present before a run starts."""

    @property
    def size(self) -> int:
        """Bytes, about; 0 if nobody can say beforehand."""

    @property
    def source(self) -> str:
        """Where it comes from, for people."""

    def missing(self) -> list[str]:
        """Files that are not here, by the names they have at the source."""

    def identity(self) -> str:
        """A line that says which contents are here: others have another. All files must be here."""

    def command(self) -> str:
        """A shell command that fetches what is missing."""

    def download(self) -> None:
        """Fetch what is missing. Raises BenchError, naming the source."""


def hub_cache() -> Path:
    """The hub's cache folder; `HF_HUB_CACHE` is read at every call."""
    from huggingface_hub import constants

    return home_path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def project_cache() -> Path:
    """The folder of prior samples, features and files from plain addresses: `$XDG_CACHE_HOME/nabla-bench`."""
    return home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nabla-bench"


@dataclass(frozen=True)
class Repository:
    """Some files of a hub repository.

    name: "org/name". files: names inside it, all required. size: bytes of them all, about; 0 if nobody can say.
    dataset: a data set, not a model. revision: branch or tag.
    also: glob patterns of small files to download along where they exist.
    """

    name: str
    files: tuple[str, ...]
    size: int = 0
    dataset: bool = False
    revision: str = "main"
    also: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The repository's name with the options of `hf download`."""
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return self.name + (" --repo-type dataset" if self.dataset else "") + revision

    def cached(self, file: str) -> Path | None:
        """Where a file lies in the hub's cache; None if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(
            self.name, file, hub_cache(), self.revision, "dataset" if self.dataset else "model"
        )
        return Path(path) if isinstance(path, str) else None

    def missing(self) -> list[str]:
        """Names of the files that are not in the cache."""
        return [file for file in self.files if self.cached(file) is None]

    def identity(self) -> str:
        """Source and revision."""
        return f"{self.source} {self.path().name}"

    def command(self) -> str:
        """`hf download` with the missing files."""
        return f"hf download {self.source} --include {shlex.join([*self.missing(), *self.also])}"

    def path(self, file: str | None = None) -> Path:
        """A file in the cache, or the snapshot's folder; fetched first if it is not there. Raises BenchError."""
        obtain([self])
        first = self.cached(self.files[0])
        if first is None:
            raise BenchError(f"the hub's cache holds no {self.files[0]} of {self.name!r}.")
        folder = first.parents[self.files[0].count("/")]
        return folder / file if file else folder

    def download(self) -> None:
        """Fetch the files into the hub's cache."""
        self.snapshot([*self.missing(), *self.also])
        if absent := self.missing():
            raise BenchError(f"the hub repository {self.name!r} has no {', '.join(absent)}: is it the right one?")

    def snapshot(self, patterns: Sequence[str]) -> None:
        """Fetch files by patterns. Raises BenchError, which says whether the repository is gated or absent."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        kind = "dataset" if self.dataset else "model"
        try:
            snapshot_download(
                self.name,
                repo_type=kind,
                revision=self.revision,
                cache_dir=hub_cache(),
                allow_patterns=list(patterns),
            )
        except GatedRepoError:
            place = f"https://huggingface.co/{'datasets/' * self.dataset}{self.name}"
            raise BenchError(
                f"the hub repository {self.name!r} is gated: ask for access at {place}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        except RepositoryNotFoundError:
            raise BenchError(
                f"the hub has no {kind} {self.name!r}, or it is private: check the name, or log in with `hf auth login`"
            ) from None
        except Exception as error:  # no such revision, no space …: the hub's sentence says it best
            raise BenchError(f"downloading {self.name!r} failed: {error}") from error


@dataclass(frozen=True)
class Download:
    """A file from a plain address, stored in `project_cache()`; a zip archive is unpacked there.

    folder: name below the cache. files: what must be there afterwards.
    """

    url: str
    folder: str
    files: tuple[str, ...]
    size: int = 0

    @property
    def source(self) -> str:
        """The address."""
        return self.url

    @property
    def path(self) -> Path:
        """The folder, whether or not it is there."""
        return project_cache() / self.folder

    def missing(self) -> list[str]:
        """Names of the files that are not there."""
        return [file for file in self.files if not (self.path / file).exists()]

    def identity(self) -> str:
        """The address, and a digest of each file."""
        return " ".join([self.url, *(digest_files(self.path / file) for file in self.files)])

    def command(self) -> str:
        """`curl` into the folder, and `unzip`."""
        name = self.url.rpartition("/")[2]
        unpack = f" && unzip {name}" if name.endswith(".zip") else ""
        return f"mkdir -p {self.path} && cd {self.path} && curl -LO {self.url}{unpack}"

    def download(self) -> None:
        """Fetch and, if it is an archive, unpack."""
        target = self.path / self.url.rpartition("/")[2]
        try:
            with urllib.request.urlopen(self.url, timeout=30) as answer:
                data, total = io.BytesIO(), int(answer.headers["Content-Length"] or 0) or None
                with wrap_file(answer, total or self.size, description=target.name) as file:
                    shutil.copyfileobj(file, data)
            write_atomic(target, data.getvalue())
            if target.suffix == ".zip":
                unpack(target, self.path)
                target.unlink()
        except OSError as error:
            raise BenchError(f"downloading {self.url} failed: {error}") from error
        if absent := self.missing():
            raise BenchError(f"{self.url} does not hold {', '.join(absent)}.")


def obtain(needs: Sequence[Requirement]) -> None:
    """Download what is missing.

    Raises BenchError, within seconds where there is no network, that lists everything missing and the ways to get it.
    """
    absent = [need for need in needs if need.missing()]
    if not absent:
        return
    try:
        if not reachable():
            raise BenchError("the hub cannot be reached")
        for need in absent:
            need.download()
    except BenchError as error:
        lines = [f"  {need.command()}  # {size_text(need.size)}" for need in absent if need.missing()]
        raise BenchError(
            f"weights or prompts are missing from {hub_cache()}, and {error}. Missing:\n"
            + "\n".join(lines)
            + "\nWhere there is a network, run `bench fetch` with the same options, or the lines above, and copy the "
            "cache here; or use the embedded model, which needs none: bench run --method nabla_gfn --model emoji."
        ) from error


def size_text(size: int) -> str:
    """A size like "1.97 GB"; "size unknown" for 0."""
    units = ((1e8, 1e9, "GB"), (1e5, 1e6, "MB"), (1, 1e3, "kB"))
    return next((f"{size / unit:.3g} {name}" for least, unit, name in units if size >= least), "size unknown")


def reachable() -> bool:
    """Whether the hub answers within three seconds; never, if `HF_HUB_OFFLINE` is set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # whatever the HTTP client raises, the meaning is the same
        return False
    return True


def is_random(needs: Sequence[Requirement]) -> bool:
    """Whether any of the weights is a stand-in that `bench.models.random_weights` wrote."""
    return any(
        isinstance(need, Repository) and not need.missing() and need.path().name in RANDOM.values() for need in needs
    )


CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt")
CLIP_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
CLIP_L = Repository("openai/clip-vit-large-patch14", CLIP_FILES, size=1_712_000_000, also=CLIP_TOKENIZER)
