"""Prompt files are read as a person reads them, or refused."""

import json
import time
from pathlib import Path

import pandas as pd
import pytest

from bench.errors import BenchError
from bench.prompts import load_prompts, split


def read(path: Path, content: str | bytes) -> set[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_prompts(str(path))
    return {*found.train, *found.heldout}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bom.txt", b"\xef\xbb\xbfa cat\r\na dog\r\n", {"a cat", "a dog"}),
        ("bom.csv", b"\xef\xbb\xbfprompt\na cat\n", {"a cat"}),
        ("bom.json", b'\xef\xbb\xbf["a cat"]', {"a cat"}),
        ("lines.txt", "a cat\u2028asleep\na\x85dog\n", {"a cat\u2028asleep", "a\x85dog"}),
        ("comments.txt", "# animals\n#\na cat\n  # more\n#1 dog\n", {"a cat", "#1 dog"}),
        ("both.csv", "text,prompt\nlong story,a cat\n", {"a cat"}),
        ("short.csv", "id,prompt\n1\n2,a cat\n", {"a cat"}),
        ("quoted.csv", 'prompt\n"a cat, asleep"\n', {"a cat, asleep"}),
    ],
)
def test_files_as_a_person_reads_them(tmp_path: Path, name: str, content: str | bytes, expected: set[str]) -> None:
    assert read(tmp_path / name, content) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("comma.csv", "prompt\na cat\na dog, asleep\n", "line 3 has more cells"),
        ("open.csv", 'prompt\n"a cat\na dog\n', "unexpected end of data"),
        ("swallowed.csv", 'prompt\n"a cat\na dog\na bird"\n', "line 4 spans several lines"),
        ("half.json", json.dumps(["a \ud83d cat"]), "surrogates not allowed"),
        ("deep.json", "[" * 100_000, "recursion"),
        ("null.json", '["a cat", null]', "list of strings"),
        ("utf16.txt", "a cat".encode("utf-16"), "codec can't decode"),
    ],
)
def test_what_would_be_read_otherwise_is_refused(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(BenchError, match=f"cannot read prompts from .*{name}.*{words}"):
        read(tmp_path / name, content)


def test_empty_cells_of_a_table_are_no_prompts(tmp_path: Path) -> None:
    pd.DataFrame({"caption": ["x", "y", "z"], "Prompt": ["a cat", None, float("nan")]}).to_parquet(
        tmp_path / "p.parquet"
    )
    found = load_prompts(str(tmp_path / "p.parquet"))
    assert found.train == ["a cat"]
    pd.DataFrame({"prompt": [1, 2]}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(BenchError, match="expected strings, got 1"):
        load_prompts(str(tmp_path / "p.parquet"))


def test_the_split_is_the_old_one_and_linear() -> None:
    found = split("test", [f"prompt {i}" for i in range(11)])
    assert found.heldout == ["prompt 4", "prompt 2"]
    start = time.perf_counter()
    many = split("test", [f"prompt {i}" for i in range(100_000)])
    assert time.perf_counter() - start < 5
    assert len(many.heldout) == 20_000
