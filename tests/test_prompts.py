"""Prompt files are read as a person reads them, or refused."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from bench.errors import BenchError
from bench.prompts import BUNDLED, load_prompts, split
from bench.recipe.prompt_sets import FILES, text_of


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


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_columns_say_what_is_known_of_a_prompt(tmp_path: Path, kind: str) -> None:
    columns = {
        "prompt": ["a cat ", "a dog", "a cat", None],
        "count": ["1", None, "2", "3"],
        "NA": ["NA", "x", "y", "z"],
    }
    frame, path = pd.DataFrame(columns), tmp_path / f"p.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    found = load_prompts(str(path))
    assert found.metadata == {"a cat": {"count": "1", "NA": "NA"}, "a dog": {"count": "", "NA": "x"}}
    assert {*found.train, *found.heldout} == found.metadata.keys()
    plain = split(found.name, ["a cat", "a dog"])
    assert found.digest != plain.digest != replace(found, metadata={"a cat": {"count": "2"}}).digest


@pytest.mark.parametrize("content", ["prompt\na cat\n", "count,prompt\n1\n2,a cat\n,\n"])
def test_a_file_with_prompts_alone_is_what_it_was(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    found = load_prompts(str(tmp_path / "p.csv"))
    assert found.metadata == ({"a cat": {"count": "2"}} if "count" in content else {})
    if not found.metadata:
        assert found.digest == split("p", ["a cat"]).digest


@pytest.mark.parametrize("name", FILES)
def test_bundled_prompts_are_those_of_the_rule(name: str) -> None:
    assert (BUNDLED / f"{name}.csv").read_text(encoding="utf8") == text_of(FILES[name]())
    found = load_prompts(name)
    assert {*found.train, *found.heldout} == found.metadata.keys()
    assert len(found.metadata) > 200 and len(found.heldout) > 40


def test_bundled_prompts_carry_their_answers() -> None:
    for prompt, known in load_prompts("rendered_text").metadata.items():
        assert f'"{known["text"]}"' in prompt
    kinds = set()
    for prompt, known in load_prompts("compositional").metadata.items():
        atoms = json.loads(known["atoms"])
        kinds.add(known["kind"])
        assert atoms and all(question.endswith("?") for question, _ in atoms)
        for question, answer in atoms:
            if question.startswith("How many"):
                assert f"{answer} {question.split()[2]}" in prompt and known["kind"] == "count"
            else:
                assert answer == "yes"
                colour = re.fullmatch(r"Is the (.*) (\w+)\?", question)
                assert not colour or known["kind"] == "position" or f"{colour[2]} {colour[1]}" in prompt
    assert kinds == {"single", "pair", "count", "colour", "position", "coloured_pair"}
