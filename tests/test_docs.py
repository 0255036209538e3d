"""What the pages promise that a machine can check: links, commands, length."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf8")):
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    defined = {name for file in Path(__file__).parent.rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf8"), re.M)}  # fmt: skip
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf8")))
    assert named <= defined, named - defined


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf8").count("\n") <= 250


def test_its_runs_are_commands(bench, monkeypatch, pipeline_folder, tmp_path) -> None:
    (tmp_path / "my-pipeline").symlink_to(pipeline_folder)
    (tmp_path / "my-prompts.txt").write_text("cat\ndog\nred bird\nfish\nbear\n")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf8"), re.M | re.S)
    runs = [line for block in blocks for line in block.splitlines() if line.startswith("bench run")]
    assert len(runs) >= 5
    for line in runs:
        words = shlex.split(line, comments=True)[1:]
        status, text = bench(*words, *(["--dry-run"] if "--dry-run" not in words else []))
        assert status == 0, (line, text)
