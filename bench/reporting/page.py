"""The comparison as one self-contained page: tables that sort and filter, plots with hover, samples side by side."""

import base64
import gzip
import io
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from bench.reporting.chooser import choices
from bench.reporting.formats import interval, parts
from bench.reporting.leaderboard import Board, narrow
from bench.reporting.page_plots import envelope_plot, plots_of, ranks_plot
from bench.reporting.report import Question, Section, compared
from bench.reporting.samples import Samples, mosaic

PIXELS = 16_000_000  # of the samples of a setting, so that a phone opens the page


def write_page(path: Path, frame: pd.DataFrame, left_out: Sequence[str], question: Question) -> Path:
    """Write the page to `path`: it asks for nothing from elsewhere, and what is quoted in it is shown as text.

    frame, left_out: of `bench.reporting.selection.collect`.
    """
    report = compared(frame, question, with_gains=True)
    plots = [plots_of(section) for section in report.sections]
    over_gains = [[envelope_plot(group)] for group, _ in report.envelopes]
    over_settings = [ranks_plot(report.ranked[0])] if report.ranked else []
    runs = [_runs(section) for section in report.sections]
    known = [choices(section.rows) for section in report.sections]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    numbers = {
        "plots": json.dumps(
            [
                [(plot.data, plot.layout, list(plot.views.values())) for plot in own]
                for own in (*plots, *over_gains, over_settings)
            ]
        ),
        "choices": json.dumps(known, separators=(",", ":")),
        "runs": json.dumps([own.astype(str).to_numpy().tolist() for own in runs]),
    }
    page = environment.get_template("page.html.j2").render(
        sections=[
            {
                "heading": section.heading,
                "verdict": section.boards[0].answers,
                "boards": section.boards,
                "plots": own,
                "samples": _samples(section),
                "runs": origin,
                "choices": choice,
            }
            for section, own, origin, choice in zip(report.sections, plots, runs, known, strict=True)
        ],
        envelopes=[
            {"board": board, "plots": own} for (_, board), own in zip(report.envelopes, over_gains, strict=True)
        ],
        over=report.over,
        ranks=over_settings,
        left_out=left_out,
        parts=parts,
        later=_later,
        gap=lambda cell: " ".join(interval(cell.gap, cell.gap_low, cell.gap_high, sign=True)).strip(),
        order=lambda cell: "" if pd.isna(cell.value) else f"{cell.value:.9g}",
        packed=_libraries() | {name: _packed(text) for name, text in numbers.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf8")
    return path


@cache
def _libraries() -> dict[str, str]:
    """What draws and sorts, packed, which takes longer than all the rest of a small page."""
    bundle = files("itables") / "html"
    sources = {
        "plotly": get_plotlyjs(),
        "tables": (bundle / "dt_bundle.js").read_text(encoding="utf8"),
        "styles": (bundle / "dt_bundle.css").read_text(encoding="utf8"),
    }
    return {name: _packed(text) for name, text in sources.items()}


def _packed(text: str) -> str:
    """What the page unpacks, at a third of the size."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _later(board: Board) -> list[int]:
    """Columns of a table in the order in which they are hidden where it is too wide; the method's is 0."""
    first = narrow(board.columns)
    return [i + 1 for i in reversed(range(len(board.columns))) if i not in first]


def _samples(section: Section) -> dict[str, Any] | None:
    """The section's images as one, and what they are."""
    samples = section.samples()
    if samples is None:
        return None
    most = max(1, PIXELS // (len(samples.rows) * math.prod(samples.images.shape[2:4])))
    samples = Samples(samples.rows, samples.columns[:most], samples.images[:, :most], samples.rewards[:, :most])
    data = io.BytesIO()
    mosaic(samples).save(data, "WEBP", quality=90, method=6)
    rewards = [["" if pd.isna(x) else f"{x:.4g}" for x in line] for line in samples.rewards]
    columns = [f"{prompt} · {sample}" for prompt, sample in samples.columns]
    return {
        "url": f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}",
        "ratio": samples.images.shape[3] / samples.images.shape[2],
        "names": {"rows": samples.rows, "columns": columns, "rewards": rewards},
    }


def _runs(section: Section) -> pd.DataFrame:
    """Where every row's runs come from: one line per run."""
    columns = ["row", "seed", "run", "config_hash", "updates", "revision", "dirty", "hardware", "status"]
    last = section.rows.sort_values(["row", "seed", "budget"]).drop_duplicates(["row", "seed"], keep="last")
    return last[columns].assign(dirty=last["dirty"].map({True: "yes", False: "no"}).fillna("unknown"))
