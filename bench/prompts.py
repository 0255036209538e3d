"""Prompt sets: named ones that ship with the project, and the user's own files.

A set is split into training and held-out prompts by a stated rule: prompts are ordered by the hash of their text and
every fifth goes to the held-out part, so that the split depends on the set alone, and a prompt is never in both.
"""

import csv
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from bench.errors import BenchError, did_you_mean

HELDOUT_EVERY = 5


@dataclass(frozen=True)
class PromptSet:
    """train and heldout are disjoint; `digest` identifies the contents."""

    name: str
    train: list[str]
    heldout: list[str]

    @property
    def digest(self) -> str:
        """Hash of all prompts and the split."""
        return hashlib.blake2b(json.dumps([self.train, self.heldout]).encode(), digest_size=8).hexdigest()


def split(name: str, prompts: list[str]) -> PromptSet:
    """The split of the module's rule, duplicates dropped; fewer than five prompts leave no held-out part."""
    ordered = sorted(dict.fromkeys(prompts), key=lambda text: hashlib.blake2b(text.encode()).digest())
    heldout = ordered[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    return PromptSet(name, [prompt for prompt in ordered if prompt not in set(heldout)], heldout)


def _emoji() -> list[str]:
    from bench.models import emoji

    return [concept["name"] for concept in json.loads((emoji.path() / "concepts.json").read_text())]


NAMED = {"emoji": _emoji, "unconditional": lambda: [""]}  # analytic models know no prompts


def load_prompts(name: str, limit: int | None = None) -> PromptSet:
    """A named set, or a file; the training part is cut to its first `limit` prompts.

    Files: .txt (one a line), .json (list of strings), .csv or .parquet (column "prompt").
    Raises BenchError for an unknown name, or a file that cannot be read or holds no prompt.
    """
    whole = _load(name)
    return replace(whole, train=whole.train[:limit])


def _load(name: str) -> PromptSet:
    if name in NAMED:
        return split(name, NAMED[name]())
    path = Path(name)
    if not path.suffix and not path.exists():
        known = did_you_mean(name, NAMED)
        raise BenchError(f"unknown prompt set {name!r}{known} Or give a .txt, .json, .csv or .parquet file.")
    try:
        prompts = [str(prompt).strip() for prompt in _read(path)]
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(f"cannot read prompts from {name!r}: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise BenchError(f"the prompt file {name!r} holds no prompt: write one prompt a line (.txt) or a JSON list.")
    return split(path.stem, prompts)


def _read(path: Path) -> list[str]:
    match path.suffix.lower():
        case ".txt" | "":
            return path.read_text(encoding="utf8").splitlines()
        case ".json":
            prompts = json.loads(path.read_text(encoding="utf8"))
            if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("expected a JSON list of strings")
            return prompts
        case ".csv":
            with path.open(newline="", encoding="utf8") as file:
                rows = list(csv.DictReader(file))
            return _column(rows, list(rows[0]) if rows else [])
        case ".parquet":
            import pandas as pd

            frame = pd.read_parquet(path)
            return _column(frame.to_dict("records"), list(frame.columns))
        case suffix:
            raise ValueError(f"unknown file type {suffix!r}: use .txt, .json, .csv or .parquet")


def _column(rows: list[dict], columns: list[str]) -> list[str]:
    found = [column for column in columns if column.lower() in ("prompt", "prompts", "text", "caption")]
    if rows and not found:
        raise ValueError(f"no column named prompt among {columns}")
    return [row[found[0]] for row in rows]
