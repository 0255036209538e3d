"""`python -m results.claims`: evaluate every claim, and write their wordings into the pages."""

import sys

from bench.publish.claims import render, used
from results.claims import CLAIMS, PAGES, ROOT


def main() -> int:
    """Write pages that changed; 1 if a claim fails, a page names none that there is, or no page has it."""
    faults = []
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        verdict = render(text, CLAIMS)
        faults += [f"{page.relative_to(ROOT)}: {fault}" for fault in verdict.faults]
        if verdict.text != text:
            page.write_text(verdict.text, encoding="utf8")
            print(f"{page.relative_to(ROOT)}: written")
    places = set(used([page.read_text(encoding="utf8") for page in PAGES]))
    faults += [f"{name}: no page has this claim" for name in CLAIMS.keys() - places]
    print("\n".join(faults) or f"{len(CLAIMS)} claims hold")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
