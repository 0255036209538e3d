"""Images of a table's rows, on the same prompts and noise: of run folders, or as a report keeps them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from bench.errors import BenchError

SIDE = 256  # pixels that an image of a report has at most
WIDEST = 16_383  # pixels of a WebP file


class Samples(NamedTuple):
    """Images of the prior and of rows of a table.

    rows: names, the prior first. columns: prompt and number of the sample. images: uint8 [rows, columns, H, W, 3].
    rewards: [rows, columns], NaN where it is not known.
    """

    rows: list[str]
    columns: list[tuple[str, str]]
    images: np.ndarray
    rewards: np.ndarray


def samples_of(rows: pd.DataFrame, order: Sequence[str], setting: str) -> Samples | None:
    """The images that runs of a setting kept, else those that a report beside the rows keeps; None without any.

    rows: of the setting, with their `source`. order: rows of the table; others are left out.
    """
    if "source" not in rows:
        return None
    return _of_runs(rows, order) or _of_report(rows, order, setting)


def write_samples(samples: Samples, setting: str, path: Path) -> None:
    """Write all images as one lossless WebP, and beside it what they are as JSON."""
    mosaic(samples).save(path.with_suffix(".webp"), lossless=True)
    known = [[None if np.isnan(x) else round(float(x), 6) for x in line] for line in samples.rewards]
    names = {"setting": setting, "rows": samples.rows, "columns": samples.columns, "rewards": known}
    path.with_suffix(".json").write_text(json.dumps(names, ensure_ascii=False, indent=1) + "\n", encoding="utf8")


def mosaic(samples: Samples) -> Image.Image:
    """All images in one, one line per row, without gaps."""
    count, width, height = samples.images.shape[:2], samples.images.shape[3], samples.images.shape[2]
    tiles = samples.images.swapaxes(1, 2).reshape(count[0] * height, count[1] * width, 3)
    return Image.fromarray(tiles)


def _of_report(rows: pd.DataFrame, order: Sequence[str], setting: str) -> Samples | None:
    """What `write_samples` left beside the rows."""
    for folder in sorted({Path(source).parent for source in rows["source"]}):
        for path in sorted(folder.glob("samples-*.json")):
            names = json.loads(path.read_text(encoding="utf8"))
            if names["setting"] != setting:
                continue
            tiles = np.asarray(Image.open(path.with_suffix(".webp")).convert("RGB"))
            lines, count = len(names["rows"]), len(names["columns"])
            height, width = tiles.shape[0] // lines, tiles.shape[1] // count
            images = tiles.reshape(lines, height, count, width, 3).swapaxes(1, 2)
            places = _places(rows[rows["source"].map(Path).map(lambda file: file.parent) == folder], names["rows"][1:])
            kept = [0, *(places[name] for name in order if name in places)]
            columns = [(prompt, sample) for prompt, sample in names["columns"]]
            rewards = np.array(names["rewards"], dtype=float)
            shown = ["prior", *(name for name in order if name in places)]
            return Samples(shown, columns, images[kept], rewards[kept])
    return None


def _places(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, int]:
    """Row of the table → its line of images, also where other runs in the table gave it a longer name."""
    places = {name: i + 1 for i, name in enumerate(names)}
    found: dict[str, list[str]] = {}
    for name in rows["row"].unique():
        found.setdefault(name if name in places else name.partition(" (")[0], []).append(name)
    return {own[0]: places[name] for name, own in found.items() if name in places and len(own) == 1}


def _of_runs(rows: pd.DataFrame, order: Sequence[str]) -> Samples | None:
    """Of all rows one seed, as seeds have noise of their own: the lowest that most rows have images of."""
    runs = rows.drop_duplicates(["row", "seed"])
    runs = runs.assign(folder=[Path(path).parent / "images" for path in runs["source"]])
    runs = runs[[(folder / "index.csv").is_file() for folder in runs["folder"]]]
    if runs.empty:
        return None
    seed = runs.groupby("seed")["row"].nunique().sort_index().idxmax()
    runs = runs[(runs["seed"] == seed) & runs["row"].isin(order)]
    found: dict[tuple[str, str], dict[str, tuple[Path, float]]] = {}  # column → row → file and reward
    names = ["prior"]
    for run in runs.sort_values("row", key=lambda column: column.map(list(order).index)).itertuples():
        names.append(str(run.row))
        for line in _index(run.folder):
            own = found.setdefault((line["prompt"], line["sample"]), {})
            for kind, name in (("prior", "prior"), ("finetuned", names[-1])):
                own.setdefault(name, (run.folder / line[kind], _number(line.get(f"{run.reward}/{kind}"))))
    shots = {key: [own[name] for name in names] for key, own in found.items() if len(own) == len(names)}
    if not shots or len(names) == 1:
        return None
    first = _image(next(iter(shots.values()))[0][0])
    shots = dict(list(shots.items())[: WIDEST // first.shape[1]])
    images = np.array([[_image(shot[i][0]) for shot in shots.values()] for i in range(len(names))])
    rewards = np.array([[shot[i][1] for shot in shots.values()] for i in range(len(names))])
    return Samples(names, list(shots), images, rewards)


def _index(folder: Path) -> list[dict[str, str]]:
    """The lines of a folder of images whose files are there; of a damaged index none."""
    try:
        with (folder / "index.csv").open(newline="", encoding="utf8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []
    files = {path.name for path in folder.iterdir() if path.is_file()}
    named = {"prompt", "sample", "prior", "finetuned"}
    return [line for line in lines if named <= line.keys() and {line["prior"], line["finetuned"]} <= files]


def _number(text: str | None) -> float:
    return float(text) if text else float("nan")


def _image(path: Path) -> np.ndarray:
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise BenchError(f"{path} is no whole image ({error}): remove it, and the figures go without it.") from None
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)
