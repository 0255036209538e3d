"""Prompt sets: named ones, and files of the user.

A set is split into training and held-out prompts by a stated rule: prompts are ordered by the hash of their text and
every fifth goes to the held-out part, so that the split depends on the set alone, and a prompt is never in both.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from bench.errors import BenchError, did_you_mean, disk_error
from bench.hub import Repository
from bench.runtime.digests import digest

HELDOUT_EVERY = 5


@dataclass(frozen=True)
class PromptSet:
    """train and heldout are disjoint; `digest` identifies the contents. metadata: see the function of this name."""

    name: str
    train: list[str]
    heldout: list[str]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of all prompts, the split, and what a file says of its prompts."""
        known = [{prompt: dict(columns) for prompt, columns in self.metadata.items()}] if self.metadata else []
        return digest([self.train, self.heldout, *known], size=8)


def split(name: str, prompts: list[str]) -> PromptSet:
    """The split of the module's rule, duplicates dropped; fewer than five prompts leave no held-out part."""
    ordered = sorted(dict.fromkeys(prompts), key=lambda text: hashlib.blake2b(text.encode()).digest())
    train = [prompt for place, prompt in enumerate(ordered, 1) if place % HELDOUT_EVERY]
    return PromptSet(name, train, ordered[HELDOUT_EVERY - 1 :: HELDOUT_EVERY])


def _emoji() -> list[str]:
    from bench.models import emoji

    return [concept["name"] for concept in json.loads((emoji.path() / "concepts.json").read_text(encoding="utf8"))]


# The animals of DDPO (Black et al., 2023).
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
llama camel bat gorilla hedgehog kangaroo"""

BUNDLED = Path(__file__).parent / "prompt_sets"  # bench.recipe.prompt_sets writes these files


def _bundled(name: str) -> list[str]:
    return _prompts(BUNDLED / f"{name}.csv")


NAMED: dict[str, Callable[[], list[str]]] = {
    "emoji": _emoji,
    "compositional": partial(_bundled, "compositional"),
    "rendered_text": partial(_bundled, "rendered_text"),
    "simple_animals": ANIMALS.split,
    "unconditional": lambda: [""],  # analytic models know no prompts
}
HUB = {  # data sets; every file of `files` is read as a prompt file
    "hpdv2_photo_painting": Repository(
        "zhwang/HPDv2", ("benchmark/photo.json", "benchmark/paintings.json"), size=150_000, dataset=True
    ),
    "drawbench": Repository(  # the hub converts every data set to Parquet under this revision and name
        "sayakpaul/drawbench", ("default/train/0000.parquet",), 15_000, dataset=True, revision="refs/convert/parquet"
    ),
}


def load_prompts(name: str, limit: int | None = None) -> PromptSet:
    """A named set, one of the hub's, or a file; the training part is cut to its first `limit` prompts.

    Files: .txt (one a line; lines that begin with "# " are comments), .json (list of strings), .csv or .parquet (column
    "prompt", else "prompts", "text" or "caption"; empty cells are left out). UTF-8, with or without a byte order mark.
    Raises BenchError for an unknown name, or a file that cannot be read or holds no prompt.
    """
    whole = _load(name)
    return replace(whole, train=whole.train[:limit], metadata=metadata(name))


def metadata(name: str) -> dict[str, dict[str, str]]:
    """Prompt → what the other columns of a .csv or .parquet file say of it, by the column's name; rewards may read it.

    Of a prompt that stands there twice the first row counts. Nothing for other files, and for sets of the hub.
    """
    path = BUNDLED / f"{name}.csv" if name in NAMED else Path(name)
    if name in HUB or path.suffix.lower() not in (".csv", ".parquet") or not path.is_file():
        return {}
    header, rows = _csv_table(path) if path.suffix.lower() == ".csv" else _parquet_table(path)
    place = header.index(_column(header))
    others = [(at, name.strip()) for at, name in enumerate(header) if at != place]
    known: dict[str, dict[str, str]] = {}
    for row in rows if others else ():
        if prompt := row[place].strip():
            known.setdefault(prompt, {name: row[at] for at, name in others})
    return known


def _csv_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows, which are filled up with empty cells."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file, strict=True)
    return header, [row + [""] * (len(header) - len(row)) for row in rows]


def _parquet_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text."""
    import pandas as pd

    frame = pd.read_parquet(path).astype(object)
    return list(map(str, frame.columns)), frame.where(frame.notna(), "").astype(str).to_numpy().tolist()


def _load(name: str) -> PromptSet:
    return split(name if name in NAMED or name in HUB else Path(name).stem, listed(name))


def listed(name: str) -> list[str]:
    """All prompts of a set or file, in its order. Raises BenchError as `load_prompts` does."""
    if name in NAMED:
        return NAMED[name]()
    if name in HUB:
        return [prompt for file in HUB[name].files for prompt in _prompts(HUB[name].path(file))]
    path = Path(name)
    if not path.suffix and not path.exists():
        hint = did_you_mean(name, [*NAMED, *HUB])
        raise BenchError(f"unknown prompt set {name!r}{hint} Or give a .txt, .json, .csv or .parquet file.")
    return _prompts(path)


def _prompts(path: Path) -> list[str]:
    """The prompts of a file, blank ones left out. Raises BenchError if there are none."""
    try:
        prompts = [prompt.strip() for prompt in _read(path)]
        for prompt in prompts:
            prompt.encode()  # JSON can hold half a character, which nothing can encode
    except OSError as error:
        raise BenchError(disk_error(error, path)) from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise BenchError(f"cannot read prompts from {str(path)!r}: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise BenchError(f"the prompt file {str(path)!r} holds no prompt: one a line (.txt), or a JSON list.")
    return prompts


def _read(path: Path) -> list[str]:
    match path.suffix.lower():
        case ".txt" | "":
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+0085 and U+2028
            return [line for line in lines if line.split(maxsplit=1)[:1] != ["#"]]
        case ".json":
            prompts = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("expected a JSON list of strings")
            return prompts
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            import pandas as pd

            frame = pd.read_parquet(path)
            cells = frame[_column(list(frame.columns))].dropna().tolist()
            if strangers := [cell for cell in cells if not isinstance(cell, str)]:
                raise ValueError(f"expected strings, got {strangers[0]!r}")
            return cells
        case suffix:
            raise ValueError(f"unknown file type {suffix!r}: use .txt, .json, .csv or .parquet")


def _read_csv(path: Path) -> list[str]:
    """The prompts of a CSV file. Raises ValueError or csv.Error for a row that reads otherwise than it looks."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        place, prompts = header.index(_column(header)) if header else 0, []
        for row in reader:
            if len(row) > len(header):
                raise ValueError(f"line {reader.line_num} has more cells than the header: quote a prompt with a comma")
            if len(row) > place and "\n" in row[place].strip():
                raise ValueError(
                    f"a prompt that ends in line {reader.line_num} spans several lines: close its quote, or use JSON"
                )
            prompts += row[place : place + 1]
    return prompts


def _column(columns: list[str]) -> str:
    names = {str(column).strip().lower(): column for column in reversed(columns)}
    column = next((names[name] for name in ("prompt", "prompts", "text", "caption") if name in names), None)
    if column is None:
        raise ValueError(f"no column named prompt among {columns}")
    return column
