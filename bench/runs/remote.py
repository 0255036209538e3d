"""Runs at a URL of any file system that fsspec knows, such as S3: worked on in a folder here, mirrored there."""

import json
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fsspec

from bench.errors import BenchError
from bench.hub import project_cache
from bench.runs.rows import default_folder
from bench.runtime.digests import digest, digest_contents
from bench.runtime.files import home_path, locked, write_atomic
from bench.settings import RunConfig

MANIFEST = "manifest.json"  # beside the run's files at the URL: their digests; written when they all are there
NOTHING = b"{}"  # the manifest of no files
READ = (".parquet", ".json", ".jsonl", ".yaml")  # what tables are made of
log = logging.getLogger(__name__)


def is_url(place: str | Path) -> bool:
    """Whether a place is not in this machine's file system."""
    return "://" in str(place)


def readable(place: str) -> Path:
    """A path; for a URL, the folder into which the rows and configurations of the runs below it are fetched now.

    Raises BenchError for a URL that cannot be reached, or below which nothing lies.
    """
    if not is_url(place):
        return home_path(place)
    remote = _Remote(place)
    names = [name for name in remote.names() if name.endswith(READ) and not name.endswith(MANIFEST)]
    if not names:
        raise BenchError(f"{place} holds no run: check the address.")
    folder = _place(place) / "read" / remote.name
    _remove_others(folder, names)
    for name in names:
        remote.get(name, folder)
    return folder


def run_place(out: str | Path | None, config: RunConfig) -> "tuple[Path, Mirror | None]":
    """The folder of a run, and its mirror if `out` is a URL. out: None stands for `default_folder`."""
    if out and is_url(out):
        mirror = Mirror(str(out))
        return mirror.folder, mirror
    return home_path(out) if out else default_folder(config), None


class Mirror:
    """A run's folder here and its copy at a URL.

    folder: where the run is worked on. The copy is whole whenever `MANIFEST` is written; a machine that begins with
    another folder goes on from it. One that has worked on the run before keeps its own files unless the copy has
    changed since.
    """

    def __init__(self, url: str):
        self.url, self._place = url.rstrip("/"), _place(url)
        self.folder = self._place / "run" / self.url.rpartition("/")[2]
        self._same = self._place / MANIFEST  # as it was when folder and copy were last the same

    @contextmanager
    def opened(self, locks: ExitStack) -> Iterator[Callable[[], None]]:
        """A block in which the run is worked on, from the files of the copy; when it ends, its files go there.

        Gives a function that stores what is new; if it fails it warns, and the run goes on. locks: holds the lock of
        the folder, which keeps out other processes of this machine alone. Raises BenchError for a URL that cannot be
        reached or holds something else, and if storing fails at the end.
        """
        locks.enter_context(locked(self._place))
        remote = _Remote(self.url)
        self._fetch(remote)
        try:
            yield lambda: self._try_to_store(remote)
        except BaseException:
            self._try_to_store(remote)
            raise
        self._store(remote)

    def _fetch(self, remote: "_Remote") -> None:
        copy = remote.read(MANIFEST)
        if copy is None and remote.names():
            raise BenchError(f"{self.url} is not empty and holds no run: choose another --out.")
        if copy is None:
            remote.write(MANIFEST, NOTHING)  # what cannot be written is better known before hours of training
        elif copy != self._manifest():
            names = list(json.loads(copy))
            _remove_others(self.folder, names)
            for name in names:
                remote.get(name, self.folder)
            write_atomic(self._same, copy)

    def _manifest(self) -> bytes:
        return self._same.read_bytes() if self._same.is_file() else NOTHING

    def _store(self, remote: "_Remote") -> None:
        before = json.loads(self._manifest())
        files = {str(path.relative_to(self.folder)): path for path in _files(self.folder)}
        now = {name: digest_contents({"": path}) for name, path in files.items()}
        if now == before:
            return
        for name, path in files.items():
            if now[name] != before.get(name):
                remote.put(path, name)
        manifest = json.dumps(now).encode()
        remote.write(MANIFEST, manifest)
        write_atomic(self._same, manifest)
        for name in before.keys() - now.keys():  # such as the last checkpoint but two
            remote.remove(name)

    def _try_to_store(self, remote: "_Remote") -> None:
        try:
            self._store(remote)
        except BenchError as error:
            log.warning("%s What is new is in %s, and is stored the next time.", error, self.folder)


class _Remote:
    """A folder at a URL. Whatever a file system raises becomes a BenchError."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.name = self.url.rpartition("/")[2]
        with self._explained():
            try:
                self._files, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise BenchError(
                    f"{url} cannot be opened ({error}): pip install 'nabla-bench[remote]' brings S3 and Google Cloud "
                    "Storage, and another file system needs its own package."
                ) from None

    def names(self) -> list[str]:
        """Names of all files below, relative to the URL."""
        with self._explained():
            try:
                found = self._files.find(self._root)
            except FileNotFoundError:
                return []
        return [path.removeprefix(self._root).lstrip("/") for path in found]

    def read(self, name: str) -> bytes | None:
        """A file's contents; None if it is not there."""
        with self._explained():
            try:
                return self._files.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """A file with these contents."""
        with self._explained():
            self._files.pipe_file(f"{self._root}/{name}", data)

    def put(self, path: Path, name: str) -> None:
        """A copy of a file of this machine."""
        with self._explained():
            self._files.put_file(str(path), f"{self._root}/{name}")

    def get(self, name: str, folder: Path) -> None:
        """Copy a file into a folder of this machine. Raises BenchError for a name that leads out of it."""
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BenchError(f"{self.url} lists {name!r}, which is outside the run: it was tampered with.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._files.get_file(f"{self._root}/{name}", str(path))

    def remove(self, name: str) -> None:
        """Delete a file."""
        with self._explained():
            self._files.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BenchError:
            raise
        except Exception as error:  # every file system has its own
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise BenchError(
                f"cannot reach {self.url} ({reason}): check the address, that the bucket exists, and this machine's "
                "credentials for it."
            ) from error


def _place(url: str) -> Path:
    """Where this machine has its own copies of what lies at a URL."""
    return project_cache() / "remote" / digest([url.rstrip("/")])


def _files(folder: Path) -> list[Path]:
    """All files of a folder but hidden and half-written ones."""
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in names if not path.name.startswith(".") and path.suffix != ".partial"]


def _remove_others(folder: Path, names: Collection[str]) -> None:
    for path in _files(folder):
        if str(path.relative_to(folder)) not in names:
            path.unlink()
