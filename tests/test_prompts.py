"""Prompt files are read as a person reads them, or refused."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.prompts import BUNDLED, FEWEST, SPLITS, load_prompts, split
from bench.recipe.prompt_sets import FILES, text_of


def read(path: Path, content: str | bytes) -> set[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_prompts(str(path))
    return set(found.all)


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


@examples(max_examples=30, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=20), min_size=8, max_size=40), st.data())
def test_prompts_that_are_added_move_no_other(prompts: set[str], data: st.DataObject) -> None:
    """A prompt's part is that of its text alone; of a set with a split that is fixed by position some would move."""
    few = data.draw(st.sets(st.sampled_from(sorted(prompts)), min_size=FEWEST))
    try:
        whole, part = split("all", prompts), split("some", few)
    except BenchError as error:
        assert "none of the" in str(error) and "for training" in str(error)
        return
    for name in SPLITS:
        assert set(getattr(part, name)) == set(getattr(whole, name)) & few
    assert sorted(whole.all) == sorted(prompts)


def test_the_parts_have_their_shares_and_a_split_takes_no_time() -> None:
    start = time.perf_counter()
    many = split("test", [f"prompt {i}" for i in range(20_000)])
    assert time.perf_counter() - start < 2
    assert [round(len(getattr(many, name)) / 20_000, 2) for name in SPLITS] == [0.6, 0.1, 0.3]


def test_the_embedded_concepts_are_enough_for_24_12_and_36() -> None:
    found = load_prompts("emoji")
    assert [len(getattr(found, name)) for name in SPLITS] == [67, 12, 44]


def test_few_prompts_are_all_for_training() -> None:
    found = split("few", list("abcd"))
    assert (len(found.train), found.validation, found.test) == (4, [], [])


def test_earlier_versions_took_every_fifth_and_had_no_test_part() -> None:
    found = split("test", [f"prompt {i}" for i in range(11)], "every_fifth")
    assert (found.validation, found.test) == (["prompt 4", "prompt 2"], [])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_may_say_the_split(tmp_path: Path, kind: str) -> None:
    texts = [f"prompt {i}" for i in range(9)]
    default = split("p", texts)
    said = ["train", " Test", "validation", "test", "train", "", "", "", ""]
    table, path = pd.DataFrame({"prompt": texts, "Split": said}), tmp_path / f"p.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    found = load_prompts(str(path))
    for name, own in (("train", {0, 4}), ("test", {1, 3}), ("validation", {2})):
        assert set(getattr(found, name)) == {texts[i] for i in own} | (set(getattr(default, name)) & set(texts[5:]))
    assert load_prompts(str(path), rule="every_fifth") == split("p", texts, "every_fifth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,split\na,dev\nb,train\n", "split 'dev' is none of train, validation, test"),
        ("prompt,split\na,train\na,test\n", "'a' is in two parts, train and test"),
        ("prompt,split\na,test\nb,validation\n", "none of the 2 is for training"),
    ],
)
def test_a_split_that_cannot_be_is_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(BenchError, match=words):
        load_prompts(str(tmp_path / "p.csv"))


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
    assert {*found.all} == found.metadata.keys()
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
    assert {*found.all} == found.metadata.keys()
    assert len(found.metadata) > 200 and len(found.test) > 40


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
