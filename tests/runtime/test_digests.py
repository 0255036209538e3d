"""Keys made of named parts, and of files."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.runtime.digests import KINDS, digest, digest_files

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.text(), VALUES, VALUES)
def test_parts_are_told_apart_whatever_their_order(parts: dict, name: str, one: object, two: object) -> None:
    first, second = parts | {name: one}, parts | {name: two}
    assert digest(first) == digest(dict(reversed(first.items())))
    assert (digest(first) == digest(second)) == (repr(one) == repr(two))


def test_what_has_no_stable_text_is_refused() -> None:
    for value in (object(), {1, 2}, Path("a")):
        with pytest.raises(TypeError):
            digest({"value": value})


@pytest.mark.parametrize("suffix", sorted(KINDS))
def test_names_and_contents_of_files(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "folder"
    (folder / "part").mkdir(parents=True)
    seen = [digest_files(folder)]
    for name, contents in (("a", b"1"), ("a", b"22"), ("b", b"1"), ("part/a", b"1")):
        (folder / f"{name}{suffix}").write_bytes(contents)
        seen.append(digest_files(folder))
    (folder / f"b{suffix}").rename(folder / f"c{suffix}")
    seen.append(digest_files(folder))
    assert len(set(seen)) == len(seen)
    (folder / "notes.md").write_text("for people")
    assert digest_files(folder) == seen[-1]
    assert digest_files(folder / f"a{suffix}") != digest_files(folder / f"c{suffix}")


def test_a_blob_of_the_hubs_cache_is_not_read(tmp_path: Path) -> None:
    """Its name is a hash of its contents."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    found = []
    for name in ("1" * 40, "2" * 40):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / "blobs" / name).write_text("the same")
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").symlink_to(tmp_path / "blobs" / name)
        found.append(digest_files(folder))
    assert found[0] != found[1]
