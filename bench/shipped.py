"""What ships with the package and is asked for by name: sweeps, and the rows of published tables."""

import logging
from pathlib import Path

import bench
from bench.errors import BenchError, did_you_mean

SWEEPS = Path(__file__).parent / "sweeps"
NOUNS = {"sweeps": "sweep", "published": "published table"}
log = logging.getLogger(__name__)


def shipped(kind: str) -> dict[str, Path]:
    """Name → place of what ships: files of "sweeps", folders of "published" rows."""
    if kind == "sweeps":
        return {path.stem: path for path in sorted(SWEEPS.glob("*.yaml"))}
    # inside the package of a wheel, beside it in a checkout: `bench.__path__` has both
    files = (file for place in bench.__path__ for file in Path(place).glob("results/published/*/rows.parquet"))
    return {file.parent.name: file.parent for file in sorted(files)}


def find(kind: str, given: Path) -> Path:
    """The path that is given if it is there, else what ships under that name. Raises BenchError if neither is."""
    known, place = shipped(kind), "file" if kind == "sweeps" else "file or folder"
    if given.is_file() or (kind == "published" and given.is_dir()):
        if str(given) in known and given.resolve() != known[str(given)].resolve():
            log.warning("%s is read from this folder; it is also the name of a %s.", given, NOUNS[kind])
        return given
    if str(given) not in known:
        raise BenchError(
            f"there is no {place} {given}, and no {NOUNS[kind]} of that name{did_you_mean(given.stem, known)}"
        )
    return known[str(given)]
