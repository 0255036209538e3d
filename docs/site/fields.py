"""Extension of griffe: the lines `name: what it is` of a docstring become a list."""

import re
from typing import Any

import griffe

FIELD = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): ", re.M)


class Fields(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(
                FIELD.sub(r"- `\1`: ", text) if FIELD.match(text) else text for text in paragraphs
            )
