"""Hook of mkdocs: a page's place on the site is its place in the repository, so every link is right in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SHOWN = (
    *("README.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "NOTICE", "docs/*.md", "docs/*.ipynb"),
    *(f"results/published/**/*.{kind}" for kind in ("md", "png", "webp", "yaml")),
    *("bench/models/emoji*/README.md", "bench/models/emoji*/*.png"),
    *("bench/models/emoji/*/README.md", "bench/models/emoji/turbo/samples.png"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
