"""Write the prompt sets that carry questions of their own: ``python -m bench.recipe.prompt_sets``.

`compositional` asks for objects, counts, colours and positions, as GenEval does (Ghosh et al., 2023), in its wording:
"a photo of …". Its column `atoms` holds questions about the picture with the right answers, as JSON, in the form of
GenEval 2. `rendered_text` asks for words in the picture, which its column `text` holds.
"""

import csv
import io
import json
from collections.abc import Iterator

from bench.prompts import BUNDLED
from bench.runtime.files import write_atomic
from bench.sampling.noise import generator

EACH = 60  # prompts of a kind
OBJECTS = {  # of COCO's classes those with a regular plural, or the one given here
    **{name: f"{name}s" for name in (
        "apple", "backpack", "banana", "bear", "bed", "bicycle", "bird", "boat", "book", "bottle", "bowl", "cake",
        "car", "cat", "chair", "clock", "cow", "cup", "dog", "donut", "elephant", "fork", "giraffe", "horse",
        "kite", "laptop", "motorcycle", "orange", "pizza", "refrigerator", "spoon", "suitcase", "train", "truck",
        "umbrella", "vase", "zebra",
    )},
    "bench": "benches", "bus": "buses", "couch": "couches", "knife": "knives", "toothbrush": "toothbrushes",
    "wine glass": "wine glasses",
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
POSITIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
WORDS = """OPEN, CLOSED, SALE, EXIT, BAKERY, LIBRARY, MUSEUM, COFFEE, WELCOME, DANGER, STOP, TAXI, HOTEL, PHARMACY,
JAZZ, Hello World, Good Morning, Thank You, Happy Birthday, Fresh Bread, Wet Paint, No Parking, Keep Left, Mind the Gap,
Lost Cat, Grand Opening, Room 404, Gate 17, Platform 9, 50% off""".replace("\n", " ").split(", ")
SCENES = (
    'a shop window with a sign that says "{}"',
    'a street sign that reads "{}"',
    'a chalkboard with the words "{}"',
    'a neon sign that says "{}" at night',
    'a birthday cake with "{}" written in icing',
    'a book cover with the title "{}"',
    'a white t-shirt printed with "{}"',
    'a wooden board on which "{}" is carved',
)
Atoms = list[tuple[str, str]]


def compositional() -> Iterator[dict[str, str]]:
    """One row per prompt: `prompt`, its `kind`, and `atoms`."""
    kinds = (_single, _pair, _count, _colour, _position, _coloured_pair)
    for kind in kinds:
        seen: dict[str, Atoms] = {}
        number = 0
        while len(seen) < min(EACH, len(OBJECTS) if kind is _single else EACH):
            text, atoms = kind(number)
            seen.setdefault(f"a photo of {text}", atoms)
            number += 1
        for prompt, atoms in seen.items():
            yield {"prompt": prompt, "kind": kind.__name__.strip("_"), "atoms": json.dumps(atoms)}


def rendered_text() -> Iterator[dict[str, str]]:
    """One row per prompt: `prompt`, and the `text` that the picture must show."""
    for scene in SCENES:
        for text in WORDS:
            yield {"prompt": scene.format(text), "text": text}


def _single(number: int) -> tuple[str, Atoms]:
    name = list(OBJECTS)[number]
    return _a(name), [_there(name)]


def _pair(number: int) -> tuple[str, Atoms]:
    one, other = _chosen("pair", number, list(OBJECTS), 2)
    return f"{_a(one)} and {_a(other)}", [_there(one), _there(other)]


def _count(number: int) -> tuple[str, Atoms]:
    (name,), (count,) = _chosen("count", number, list(OBJECTS), 1), _chosen("number", number, list(NUMBERS.values()), 1)
    return f"{count} {OBJECTS[name]}", [(f"How many {OBJECTS[name]} are there in the image?", count)]


def _colour(number: int) -> tuple[str, Atoms]:
    ((name, colour),) = _coloured("colour", number, 1)
    return _a(f"{colour} {name}"), [_there(name), _is(name, colour)]


def _position(number: int) -> tuple[str, Atoms]:
    one, other = _chosen("position", number, list(OBJECTS), 2)
    (place,) = _chosen("place", number, list(POSITIONS), 1)
    asked = f"Is the {one} {POSITIONS[place]} the {other}?"
    return f"{_a(one)} {place} {_a(other)}", [_there(one), _there(other), (asked, "yes")]


def _coloured_pair(number: int) -> tuple[str, Atoms]:
    pairs = _coloured("coloured_pair", number, 2)
    atoms = [atom for name, colour in pairs for atom in (_there(name), _is(name, colour))]
    return " and ".join(_a(f"{colour} {name}") for name, colour in pairs), atoms


def _chosen(kind: str, number: int, values: list[str], count: int) -> list[str]:
    """Different values, drawn by name."""
    places = generator(0, "select", "prompt set", kind, step=number).permutation(len(values))
    return [values[place] for place in places[:count]]


def _coloured(kind: str, number: int, count: int) -> list[tuple[str, str]]:
    """Different objects in different colours."""
    names = [name for name in OBJECTS if name != "orange"]
    return list(zip(_chosen(kind, number, names, count), _chosen(f"{kind} of", number, [*COLOURS], count), strict=True))


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _there(name: str) -> tuple[str, str]:
    return f"Is there {_a(name)} in the image?", "yes"


def _is(name: str, colour: str) -> tuple[str, str]:
    return f"Is the {name} {colour}?", "yes"


def text_of(rows: Iterator[dict[str, str]]) -> str:
    """The rows as a CSV file."""
    table = list(rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


FILES = {"compositional": compositional, "rendered_text": rendered_text}

if __name__ == "__main__":
    for name, rows in FILES.items():
        write_atomic(BUNDLED / f"{name}.csv", text_of(rows()).encode())
