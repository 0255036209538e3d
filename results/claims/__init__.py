"""What README and docs say of results: one function per sentence or table, one module per subject.

A function's name is the claim's, or a name in `OF_A_TABLE`, where tables share a function. It returns the wording,
computed from published rows, and the conditions under which it holds. `python -m results.claims` writes the wordings
into the pages.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

from bench.publish.claims import Claim
from results.claims import frontiers, image_ends, image_verdicts, over_optimisation, pictures, points, tables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = (frontiers, image_ends, image_verdicts, over_optimisation, pictures, points, tables)
CLAIMS: dict[str, Callable[[], Claim]] = {
    name: function
    for module in MODULES
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
}
for module in (image_ends, image_verdicts, pictures, points):
    CLAIMS |= module.OF_A_TABLE
