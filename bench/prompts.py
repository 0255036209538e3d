"""Prompt sets: named ones, and files of the user.

A set has three parts: training, validation (what settings are tuned on) and test (what nothing has seen). A prompt's
part is fixed by the hash of its text alone, so that prompts that are added move no other, unless its file says it.
"""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from bench.errors import BenchError, did_you_mean, disk_error
from bench.hub import Repository
from bench.runtime.digests import digest
from bench.settings import SplitRule

SPLITS = ("train", "validation", "test")
TEST, VALIDATION = 0.3, 0.1  # shares of all texts, by their hash; the rest is for training
FEWEST = 5  # a set of fewer prompts is all for training
Line: TypeAlias = tuple[str, str]  # of a file: a prompt, and the part that the file puts it in, or ""


@dataclass(frozen=True)
class PromptSet:
    """The parts are disjoint, each in the order of the hashes; `digest` identifies the contents.

    metadata: see the function of this name.
    """

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def all(self) -> list[str]:
        """Every prompt, part by part."""
        return [*self.train, *self.validation, *self.test]

    @property
    def digest(self) -> str:
        """Hash of all prompts, the split, and what a file says of its prompts.

        Without a test part it is what it was before there were such parts.
        """
        known = [{prompt: dict(columns) for prompt, columns in self.metadata.items()}] if self.metadata else []
        return digest([self.train, self.validation, *[self.test] * bool(self.test), *known], size=8)


def split(
    name: str, prompts: Iterable[str], rule: SplitRule = "hash", parts: Mapping[str, str] | None = None
) -> PromptSet:
    """The prompts in parts, duplicates dropped.

    rule: "hash" looks at each text alone; "every_fifth" is the rule of earlier versions: of the prompts in the order of
    their hashes every fifth is for validation, the others for training. parts: prompt → what its file says its part is,
    which "hash" follows. Raises BenchError for a part that there is not, and if no prompt is left for training.
    """
    ordered = sorted(dict.fromkeys(prompts), key=_hash)
    if rule == "every_fifth":
        chosen = dict(zip(ordered, itertools.cycle(["train"] * 4 + ["validation"]), strict=False))
    else:
        default = ["train" if len(ordered) < FEWEST else _part(prompt) for prompt in ordered]
        chosen = dict(zip(ordered, default, strict=True)) | dict(parts or {})
    if strangers := set(chosen.values()) - set(SPLITS):
        raise BenchError(
            f"prompts of {name!r}: split {min(strangers)!r} is none of {', '.join(SPLITS)}. "
            "If the column means something else, rename it."
        )
    found = {part: [prompt for prompt in ordered if chosen[prompt] == part] for part in SPLITS}
    if not found["train"]:
        raise BenchError(
            f"prompts of {name!r}: none of the {len(ordered)} is for training. Add some, or a column 'split' that says "
            "which are."
        )
    return PromptSet(name, found["train"], found["validation"], found["test"])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode()).digest()


def _part(text: str) -> str:
    place = int.from_bytes(_hash(text)[:8]) / 2**64  # uniform in [0, 1)
    return "test" if place < TEST else "validation" if place < TEST + VALIDATION else "train"


def _emoji() -> list[str]:
    from bench.models import emoji

    return [concept["name"] for concept in json.loads((emoji.path() / "concepts.json").read_text(encoding="utf8"))]


# The animals of DDPO (Black et al., 2023).
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
llama camel bat gorilla hedgehog kangaroo"""

BUNDLED = Path(__file__).parent / "prompt_sets"  # bench.recipe.prompt_sets writes these files


def _bundled(name: str) -> list[str]:
    return [prompt for prompt, _ in _prompts(BUNDLED / f"{name}.csv")]


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


def load_prompts(name: str, limit: int | None = None, rule: SplitRule = "hash") -> PromptSet:
    """A named set, one of the hub's, or a file; the training part is cut to its first `limit` prompts.

    Files: .txt (one a line; lines that begin with "# " are comments), .json (list of strings), .csv or .parquet (column
    "prompt", else "prompts", "text" or "caption"; empty cells are left out). A column "split" says which part a prompt
    is in. UTF-8, with or without a byte order mark. rule: see `split`.
    Raises BenchError for an unknown name, or a file that cannot be read or holds no prompt.
    """
    lines, said = _lines(name), dict[str, str]()
    for prompt, part in lines:
        if part and said.setdefault(prompt, part) != part:
            raise BenchError(
                f"prompts of {name!r}: {prompt!r} is in two parts, {said[prompt]} and {part}: keep one line."
            )
    short = name if name in NAMED or name in HUB else Path(name).stem
    whole = split(short, [prompt for prompt, _ in lines], rule, said)
    return replace(whole, train=whole.train[:limit], metadata=metadata(name))


def metadata(name: str) -> dict[str, dict[str, str]]:
    """Prompt → what the other columns of a .csv or .parquet file say of it, by the column's name; rewards may read it.

    Of a prompt that stands there twice the first row counts. Nothing for other files, and for sets of the hub.
    """
    path = BUNDLED / f"{name}.csv" if name in NAMED else Path(name)
    if name in HUB or path.suffix.lower() not in (".csv", ".parquet") or not path.is_file():
        return {}
    header, rows = _csv_table(path) if path.suffix.lower() == ".csv" else _parquet_table(path)
    place, part = _columns(header)
    others = [(at, name.strip()) for at, name in enumerate(header) if at not in (place, part)]
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


def listed(name: str) -> list[str]:
    """All prompts of a set or file, in its order. Raises BenchError as `load_prompts` does."""
    return [prompt for prompt, _ in _lines(name)]


def _lines(name: str) -> list[Line]:
    if name in NAMED:
        return [(prompt, "") for prompt in NAMED[name]()]
    if name in HUB:
        return [line for file in HUB[name].files for line in _prompts(HUB[name].path(file))]
    path = Path(name)
    if not path.suffix and not path.exists():
        hint = did_you_mean(name, [*NAMED, *HUB])
        raise BenchError(f"unknown prompt set {name!r}{hint} Or give a .txt, .json, .csv or .parquet file.")
    return _prompts(path)


def _prompts(path: Path) -> list[Line]:
    """The lines of a file, those without a prompt left out. Raises BenchError if there are none."""
    try:
        lines = [(prompt.strip(), part.strip().lower()) for prompt, part in _read(path)]
        for prompt, _ in lines:
            prompt.encode()  # JSON can hold half a character, which nothing can encode
    except OSError as error:
        raise BenchError(disk_error(error, path)) from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise BenchError(f"cannot read prompts from {str(path)!r}: {error}") from error
    lines = [line for line in lines if line[0]]
    if not lines:
        raise BenchError(f"the prompt file {str(path)!r} holds no prompt: one a line (.txt), or a JSON list.")
    return lines


def _read(path: Path) -> list[Line]:
    match path.suffix.lower():
        case ".txt" | "":
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+0085 and U+2028
            return [(line, "") for line in lines if line.split(maxsplit=1)[:1] != ["#"]]
        case ".json":
            prompts = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("expected a JSON list of strings")
            return [(prompt, "") for prompt in prompts]
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            import pandas as pd

            frame = pd.read_parquet(path)
            place, part = _columns(list(frame.columns))
            frame = frame[frame.iloc[:, place].notna()]
            parts = [""] * len(frame) if part is None else frame.iloc[:, part].fillna("").tolist()
            prompts = frame.iloc[:, place].tolist()
            if strangers := [cell for cell in [*prompts, *parts] if not isinstance(cell, str)]:
                raise ValueError(f"expected strings, got {strangers[0]!r}")
            return list(zip(prompts, parts, strict=True))
        case suffix:
            raise ValueError(f"unknown file type {suffix!r}: use .txt, .json, .csv or .parquet")


def _read_csv(path: Path) -> list[Line]:
    """The lines of a CSV file. Raises ValueError or csv.Error for a row that reads otherwise than it looks."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        place, part = _columns(header) if header else (0, None)
        lines = []
        for row in reader:
            if len(row) > len(header):
                raise ValueError(f"line {reader.line_num} has more cells than the header: quote a prompt with a comma")
            if len(row) > place and "\n" in row[place].strip():
                raise ValueError(
                    f"a prompt that ends in line {reader.line_num} spans several lines: close its quote, or use JSON"
                )
            if len(row) > place:
                lines.append((row[place], row[part] if part is not None and part < len(row) else ""))
    return lines


def _columns(columns: list[str]) -> tuple[int, int | None]:
    """Places of the prompts and of what is said of their part, None if nothing is."""
    places = {str(column).strip().lower(): place for place, column in reversed(list(enumerate(columns)))}
    place = next((places[name] for name in ("prompt", "prompts", "text", "caption") if name in places), None)
    if place is None:
        raise ValueError(f"no column named prompt among {columns}")
    return place, places.get("split")
