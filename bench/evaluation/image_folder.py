"""Finished images as files, finetuned and prior side by side, with a table that describes them."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from PIL import Image
from torch import Tensor

from bench.metric import Samples
from bench.runtime.files import write_atomic
from bench.sampling.noise import key

EACH = 4  # images saved for each prompt: 200 kB in all for the embedded prior, 30 MB for 64 prompts at 512 pixels
LOSSLESS = 128  # pixels: up to this size images are saved lossless, larger ones as WebP of quality 90


def save_images(folder: Path, sets: Mapping[str, Samples], *, seed: int | None, each: int) -> None:
    """Write `<prompt's number>-<prompt>-<sample>-<set>.webp` of the first images of each prompt, and `index.csv`.

    sets: name → samples of the same prompts and noise, purpose "evaluate". seed: of that noise; the index holds each
    sample's key, from which NumPy's Philox makes it again. None: nobody knows their noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(sets.values()))
    lines = []
    for place, (prompt, rows) in enumerate(first.rows().items()):
        stem = f"{place:03d}-{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:40]}"
        for sample, row in enumerate(rows[:each].tolist()):
            line = {"prompt": prompt, "split": first.splits[row], "sample": sample}
            if seed is not None:
                line["noise"] = f"0x{key(seed, 'evaluate', prompt, sample):032x}"
            for name, samples in sets.items():
                line[name] = f"{stem}-{sample}-{name}.webp"
                write_atomic(folder / line[name], webp(samples.strip(row)))
                line |= {f"{reward}/{name}": f"{values[row]:.6g}" for reward, values in samples.rewards.items()}
            lines.append(line)
    table = pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")
    write_atomic(folder / "index.csv", table.encode())


def webp(image: Tensor) -> bytes:
    """A uint8 image [3, H, W] as WebP."""
    data = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(
        data, "WEBP", lossless=max(image.shape) <= LOSSLESS, quality=90, exact=True
    )
    return data.getvalue()
