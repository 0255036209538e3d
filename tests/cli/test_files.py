"""Whatever a file holds, or a path or a number is: one sentence that names it and the way out, and status 2."""

import gzip
import io
import json
import os
import shutil
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Bench = Callable[..., tuple[int, str]]
LITTLE = ("--set", "evaluation.samples_per_prompt=4", "--set", "evaluation.metrics=[reward]")


def told(bench: Bench, *arguments: object) -> str:
    """The one sentence of a command that must fail."""
    status, text = bench(*arguments)
    assert status == 2, text
    assert "Traceback" not in text and "Aborted" not in text
    assert text.count("Error:") == 1
    return text[text.index("Error:") :]


# --- archives -------------------------------------------------------------------------------------------------------


def tar_of(path: Path, member: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member, io.BytesIO(b"x" * member.size))


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def file(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 1
    return member


def zip_with(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("run/config.yaml", "method: {name: prior}\n" * 9)
        path.write_bytes(change(path.read_bytes()))

    return make


def with_header(place: int, value: int) -> Callable[[bytes], bytes]:
    """A byte of the entry in a zip's directory changed."""

    def change(data: bytes) -> bytes:
        at = data.index(b"PK\1\2") + place
        return data[:at] + bytes([value]) + data[at + 1 :]

    return change


ARCHIVES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bad checksum": ("a.zip", zip_with(lambda data: data.replace(b"prior", b"draft", 1))),
    "a zip that is cut": ("a.zip", zip_with(lambda data: data[: len(data) // 2])),
    "a zip with a password": ("a.zip", zip_with(with_header(8, 1))),
    "a zip of an unknown compression": ("a.zip", zip_with(with_header(10, 99))),
    "a way up": ("a.tar.gz", lambda path: tar_of(path, file("../outside"))),
    "an absolute name": ("a.tar.gz", lambda path: tar_of(path, link("run", "/etc"))),
    "a link up": ("a.tar.gz", lambda path: tar_of(path, link("run", "../../outside"))),
    "a gzip that is cut": ("a.tar.gz", lambda path: path.write_bytes(gzip.compress(os.urandom(9000))[:5000])),
    "an empty file": ("a.tar.gz", lambda path: path.write_bytes(b"")),
    "a text": ("a.zip", lambda path: path.write_text("no archive", encoding="utf8")),
    "an unknown suffix": ("a.rar", lambda path: path.write_bytes(b"Rar!")),
    "nothing": ("a.zip", lambda path: None),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives(case: str, bench: Bench, tmp_path: Path) -> None:
    name, make = ARCHIVES[case]
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    make(place / name)
    before = sorted(tmp_path.rglob("*"))
    sentence = told(bench, "merge", place / name, tmp_path / "published")
    assert str(place / name) in sentence
    assert sorted(tmp_path.rglob("*")) == before


# --- paths and numbers ----------------------------------------------------------------------------------------------

PLACES = ("FILE", "FOLDER", "ABSENT", "FILE/below", "n" * 300)
PATHS = [
    (command, place)
    for command, fine in {
        ("run", "prior", "--model", "ring", *LITTLE, "--out", "PATH"): ("FOLDER", "ABSENT"),
        ("run", "prior", "--model", "PATH"): ("FILE/below",),  # a hub id
        ("run", "prior", "--prompts", "PATH"): ("FILE",),  # a prompt a line
        ("sample", "PATH"): (),
        ("sample", "PATH", "--prompts", "PATH"): (),
        ("eval", "PATH"): (),
        ("verify", "PATH"): (),
        ("push", "PATH", "a/b"): (),
        ("reproduce", "PATH"): (),
        ("report", "PATH"): (),
        ("serve", "PATH"): (),
        ("sweep", "PATH"): (),
        ("convert", "PATH", "--like", "sd15"): (),
        ("pack", "PATH", "--out", "ABSENT/x.zip"): (),
        ("merge", "PATH", "ABSENT"): (),
    }.items()
    for place in PLACES
    if place not in fine
]


@pytest.mark.parametrize(
    ("command", "place"), PATHS, ids=lambda one: one[:9] if isinstance(one, str) else " ".join(one)
)
def test_paths(command: tuple[str, ...], place: str, bench: Bench, tmp_path: Path, monkeypatch) -> None:
    """A file where a folder is needed, a folder where a file is, nothing at all, and a name that is too long."""
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("x: [1\n", encoding="utf8")
    Path("FOLDER").mkdir()
    sentence = told(bench, *[word.replace("PATH", place) for word in command])
    assert place[:9] in sentence


@pytest.mark.skipif(not os.geteuid(), reason="root may read everything")
def test_rights(bench: Bench, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert "right" in told(bench, "run", "prior", "--model", "ring", *LITTLE, "--out", closed / "run")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "x", "", "1,", "1e999"])
@pytest.mark.parametrize("option", ["--at-reward-gain", "--at-updates", "--at-seconds"])
def test_numbers(option: str, value: str, bench: Bench, tmp_path: Path) -> None:
    status, text = bench("report", tmp_path, option, value)
    assert status == 2
    assert "Traceback" not in text
    assert option in text or "--at-..." in text or value in ("0", "")


def test_ports(bench: Bench, run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = told(bench, "serve", run, "--port", port)
    assert str(port) in sentence and "another" in sentence
    for port in (-1, 65536, 99999):
        status, text = bench("serve", run, "--port", port)
        assert status == 2
        assert "--port" in text and "Traceback" not in text


# --- damaged files of a run -----------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other": lambda path: path.write_bytes(b'{"a": [1, null]}'),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\0\1" * 9),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}
SOURCES = {
    "config.yaml": ["eval", "verify", "pack", "push"],
    "contents.json": ["eval", "verify", "pack"],
    "environment.json": ["pack"],
    "rows.parquet": ["verify", "report", "reproduce", "pack"],
    "adapter/adapters.safetensors": ["eval", "verify"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of points."""
    from test_fuzz import outcome  # here, as the fuzzed tests would be collected twice

    folder = tmp_path_factory.mktemp("files") / "run"
    settings = [*LITTLE, "--set", "train.checkpoint_every=1"]
    status, text = outcome("run", "draft_1", "--model", "ring", "--updates", 1, *settings, "--out", folder)
    assert status == 0, text
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", SOURCES)
def test_damaged_runs(name: str, damage: str, run: Path, bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("tensorboard", "*.png", ".lock"))
    (path,) = folder.glob(name) if "adapter" not in name else folder.glob("adapter/*.safetensors")
    DAMAGE[damage](path)
    for command in SOURCES[name]:
        more = {"pack": ("--out", tmp_path / "pack.zip"), "push": ("a/b",)}.get(command, ())
        place = {"pack": folder.parent, "reproduce": path}.get(command, folder)
        status, text = bench(command, place, *more)
        assert "Traceback" not in text
        if status:
            assert status == 2, text
            assert str(folder) in text or path.name in text or "runs" in text, text


def test_damaged_pictures(run: Path, bench: Bench, tmp_path: Path) -> None:
    """The report goes without them, but for one that is no image: it is named."""
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    (folder / "images").mkdir()
    asked = ("report", folder, "--metrics", "reward/train", "--format", "html", "--out", tmp_path / "out")
    index = folder / "images" / "index.csv"
    for text in (b"", b"\xff\xfe", b"prompt,sample\na,0\n", b"prompt,sample,prior,finetuned\na,0,../x,gone.webp\na\n"):
        index.write_bytes(text)
        assert bench(*asked)[0] == 0
    for name in ("p.webp", "f.webp"):
        (folder / "images" / name).write_bytes(b"RIFF no picture")
    index.write_text("prompt,sample,prior,finetuned\na,0,p.webp,f.webp\n", encoding="utf8")
    assert "p.webp" in told(bench, *asked)


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: [1", "line"), ("methods: prior", "methods"), ("- 1", ""), ("", ""), ('"\\ud800"', ""), ("\x00", "")],
)
def test_sweeps(text: str, word: str, bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text, encoding="utf8")
    sentence = told(bench, "sweep", tmp_path / "s.yaml")
    assert "s.yaml" in sentence and word in sentence


def test_half_a_character_is_refused(bench: Bench) -> None:
    sentence = told(bench, "run", "ddpo", "--set", f"model.negative_prompt={json.dumps(chr(0xD800))}", "--dry-run")
    assert "model.negative_prompt" in sentence
