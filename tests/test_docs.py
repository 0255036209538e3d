"""What the pages promise that a machine can check: links, commands, names, length, plain words."""

import re
import shlex
from pathlib import Path

import pytest

from bench import registry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf8") for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Words of our own where the field has one, or where plain English says it in fewer.
HOUSE_WORDS = {
    r"prices?": "KL, cost",
    r"pays?|paid": "has, takes, costs",
    r"(not )?told (apart|from)": "differ significantly",
    r"what (it|that) is for": "use, purpose",
    r"(network )?rows through the (network|denoiser)": "NFE",
    r"network rows": "NFE",
    r"the same law": "distribution",
    r"(a|every) (line|row|table|dot|run|prompt|seed|panel|file|module|value) an? \w+": "one per",
    r"honest": "accurate",
    r"shortage|towers?|claimed": "say what it is",
}


def prose(page: Path) -> str:
    """The page without blocks of code, code spans and links' targets."""
    text = re.sub(r"^ *```.*?^ *```", "", TEXTS[page], flags=re.M | re.S)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


def code(page: Path, language: str) -> list[str]:
    """The page's blocks of code in a language; "": those of commands."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[page], re.M | re.S) if name == language]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), target
        if anchor and aim.name != "api.md":  # whose headings are made of docstrings: `make docs` checks them
            headings = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@each_page
def test_tests_that_are_named_exist(page: Path) -> None:
    files = Path(__file__).parent.rglob("test_*.py")
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf8"), re.M)}
    named = set(re.findall(r"`(test_\w+)`", TEXTS[page]))
    assert named <= defined, named - defined


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:bench|methods|rewards|metrics|results|tests|docs)/[\w./-]*)`", TEXTS[page]):
        assert "NAME" in name or (ROOT / name).exists(), name


@each_page
def test_words_are_those_of_the_field(page: Path) -> None:
    for word, better in HOUSE_WORDS.items():
        assert not (found := re.search(rf"\b({word})\b", prose(page), re.I)), f"{found[0]!r}: {better}"


def test_the_program_uses_the_same_words() -> None:
    """In what it prints, in docstrings, comments and names."""
    folders = ("bench", "methods", "metrics", "rewards", "results/claims")
    files = [
        path for name in folders for ending in ("py", "j2", "js", "yaml") for path in ROOT.glob(f"{name}/**/*.{ending}")
    ]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]!r}: {better}"
        for path in files
        for word, better in HOUSE_WORDS.items()
        for match in re.finditer(rf"\b({word})\b", path.read_text(encoding="utf8"), re.I)
    }
    assert len(files) > 300
    assert not found


def test_the_readme_has_few_words() -> None:
    assert len(TEXTS[README].split()) <= 1300


def test_the_readme_fits_two_screens() -> None:
    lines = re.sub("<!--.*?-->", "", TEXTS[README]).splitlines()  # as rendered
    assert len(lines) < 120
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "methods.md"], ids=lambda page: page.name)
def test_every_method_is_listed(page: Path) -> None:
    listed = set(re.findall(r"`(\w+)`", TEXTS[page]))
    assert registry.BUILT_IN["methods"].keys() <= listed


def test_the_api_reference_has_every_public_name() -> None:
    stub = (ROOT / "bench" / "__init__.pyi").read_text(encoding="utf8")
    public = {f"bench.{module}.{name}" for module, name in re.findall(r"^from \.([\w.]+) import (\w+)", stub, re.M)}
    listed = re.findall(r"^::: ([\w.]+)$", TEXTS[ROOT / "docs" / "api.md"], re.M)
    assert public
    assert public <= set(listed), public - set(listed)


def test_the_runs_of_the_pages_are_commands(bench, untried, monkeypatch, pipeline_folder, tmp_path) -> None:
    (tmp_path / "my-pipeline").symlink_to(pipeline_folder)
    (tmp_path / "my-prompts.txt").write_text("cat\ndog\nred bird\nfish\nbear\n")
    monkeypatch.chdir(tmp_path)
    blocks = [block for page in (README, ROOT / "docs" / "use.md") for block in code(page, "")]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("bench run ")]
    runs = {tuple(shlex.split(line, comments=True)[1:]) for line in lines}
    assert len(runs) >= 8
    for words in runs:  # the probe draws samples, and has tests of its own
        status, text = bench(*(word for word in words if word not in ("--dry-run", "--probe")), "--dry-run")
        assert status == 0, (words, text)


def test_the_readmes_reward_works(tmp_path, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    names: dict = {}
    exec(code(README, "python")[0], names)
    images = torch.rand(2, 3, 8, 8)
    symmetric = (images + images.flip(3)) / 2
    scores = names["Symmetry"](names["Symmetry"].Config())(torch.cat([images, symmetric]), [""] * 4)
    assert scores.shape == (4,)
    assert (scores[:2] < scores[2:]).all()
