"""What `bench ls` lists: everything that can be named, a line each. Only rewards and metrics take torch's import."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from bench import config, registry, shipped
from bench import prompts as prompt_sets
from bench.errors import BenchError
from bench.hub import Requirement, size_text
from bench.models import catalogue
from bench.models.card import HubCard
from bench.models.cards import CARDS


def names(kind: str) -> list[str]:
    """What can be named of a kind: a key of `registry.BUILT_IN`, or "prompts", "suites", "sweeps" or "published"."""
    if kind == "suites":
        return sorted(path.stem for path in config.SUITES.glob("*.yaml"))
    if kind in shipped.NOUNS:
        return list(shipped.shipped(kind))
    if kind == "prompts":
        return [*prompt_sets.NAMED, *prompt_sets.HUB]
    return catalogue.names() if kind == "models" else list(registry.plugins(kind))


def describe(kind: str) -> Iterator[tuple[str, str, str]]:
    """Name, a line of description and what it asks for (a GPU, a download), in rich markup."""
    for name in names(kind):
        try:
            text, needs = _text(kind, name), _needs(kind, name)
            missing = sum(need.size for need in needs if need.missing())
            state = f"{size_text(missing)} to download" if missing else "[green]downloaded[/green]"
            if kind == "suites":  # whose rewards and metrics need more than the model
                state = "downloads"
            gpu = ["a GPU"] * any(
                need == card.repository() for need in needs for card in CARDS.values() if isinstance(card, HubCard)
            )
            yield name, escape(text), ", ".join([*gpu, *[state] * bool(needs)])
        except BenchError as error:
            yield name, f"[red]broken:[/red] {escape(str(error))}", ""


def _text(kind: str, name: str) -> str:
    if kind == "suites":
        return config.load_suite(name)["description"]
    if kind == "prompts":
        if name in prompt_sets.HUB:
            return prompt_sets.HUB[name].name
        prompt_set = prompt_sets.load_prompts(name)
        return f"{len(prompt_set.train)} training and {len(prompt_set.heldout)} held-out prompts"
    if kind == "sweeps":
        return _sweep_text(yaml.safe_load(shipped.shipped(kind)[name].read_text(encoding="utf8")))
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
