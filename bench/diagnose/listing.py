"""What `bench ls` lists: everything that can be named, a line each. Only rewards and metrics take torch's import."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from bench import config, registry, shipped
from bench import prompts as prompt_sets
from bench.errors import BenchError
from bench.hub import Requirement, size_text
from bench.models import catalogue
from bench.models.card import HubCard
from bench.models.cards import CARDS
from bench.runtime import yaml_text


def names(kind: str) -> list[str]:
    """What can be named of a kind: a key of `registry.BUILT_IN`, or "prompts", "suites", "sweeps" or "published"."""
    if kind == "suites":
        return config.suite_names()
    if kind in shipped.NOUNS:
        return list(shipped.shipped(kind))
    if kind == "prompts":
        return [*prompt_sets.NAMED, *prompt_sets.HUB]
    return catalogue.names() if kind == "models" else list(registry.plugins(kind))


def describe(kind: str) -> Iterator[tuple[str, Text, Text]]:
    """Name, a line of description and what it asks for (a GPU, a download)."""
    for name in names(kind):
        try:
            text, needs = _text(kind, name), _needs(kind, name)
            missing = sum(need.size for need in needs if need.missing())
            state = Text(f"{size_text(missing)} to download") if missing else Text("downloaded", "green")
            if kind == "suites":  # whose rewards and metrics need more than the model
                state = Text("downloads")
            gpu = [Text("a GPU")] * any(
                need == card.repository() for need in needs for card in CARDS.values() if isinstance(card, HubCard)
            )
            setup = [Text(text) for text in [registry.load(kind, name).setup if kind == "rewards" else ""] if text]
            yield name, Text(text), Text(", ").join([*gpu, *setup, *[state] * bool(needs)])
        except BenchError as error:
            yield name, Text.assemble(("broken:", "red"), f" {error}"), Text()


def _text(kind: str, name: str) -> str:
    if kind == "suites":
        return config.load_suite(name)["description"]
    if kind == "prompts":
        if name in prompt_sets.HUB:
            return prompt_sets.HUB[name].name
        prompt_set = prompt_sets.load_prompts(name)
        columns = list(next(iter(prompt_set.metadata.values()), {}))
        columns_text = f"; columns {', '.join(columns)}" if columns else ""
        parts = ", ".join(f"{len(getattr(prompt_set, split))} {split}" for split in prompt_sets.SPLITS)
        return f"{parts} prompts{columns_text}"
    if kind == "sweeps":
        return _sweep_text(yaml_text.parse(shipped.shipped(kind)[name].read_text(encoding="utf8")))
    if kind == "published":
        return _published_text(shipped.shipped(kind)[name])
    if kind == "models" and name in CARDS:
        return CARDS[name].text
    package = registry.find(kind, name).package
    return registry.describe(kind, name) + ("" if package == "nabla-bench" else f" [{package}]")


def _sweep_text(spec: dict[str, Any]) -> str:
    on = ", ".join(f"{key} {spec[key]}" for key in ("suite", "reward") if key in spec)
    tuned = f"; tuned: {', '.join(spec['tune']['grid'])}" if "tune" in spec else ""
    return f"{len(spec['methods'])} methods × {spec['seeds']} seeds, {on}{tuned}"


def _published_text(folder: Path) -> str:
    import pandas as pd  # not for a shell that completes names

    rows = pd.read_parquet(folder / "rows.parquet", columns=["run", "method", "reward", "model"])
    counts = f"{rows['run'].nunique()} runs, {rows['method'].nunique()} methods"
    return f"{counts}; reward {', '.join(rows['reward'].unique())} on {', '.join(rows['model'].unique())}"


def _needs(kind: str, name: str) -> Sequence[Requirement]:
    """Files that do not ship."""
    match kind:
        case "models":
            return [one] if (one := catalogue.repository(name)) else []
        case "prompts":
            return [prompt_sets.HUB[name]] if name in prompt_sets.HUB else []
        case "rewards":
            return registry.load(kind, name).files
        case "metrics":
            from bench.evaluation.features import find_space

            space = registry.load(kind, name).space
            return find_space(space).files if space else []
        case "suites":
            return _needs("models", config.load_suite(name)["model"]["name"])
    return []
