"""What `bench ls` lists: everything that can be named, a line each."""

from rich.markup import escape

from bench import config, registry
from bench import prompts as prompt_sets
from bench.errors import BenchError
from bench.models import catalogue


def describe(kind: str) -> dict[str, str]:
    """Name → one line of description, in rich markup; kind: "methods", "rewards", "metrics", "models", … ."""
    if kind == "suites":
        return config.suites()
    if kind == "prompts":
        sets = {name: prompt_sets.load_prompts(name) for name in prompt_sets.NAMED}
        lines = {name: f"{len(s.train)} training and {len(s.heldout)} held-out prompts" for name, s in sets.items()}
        return lines | {name: f"from the hub: {need.name}" for name, need in prompt_sets.HUB.items()}
    lines = dict(catalogue.NAMED) if kind == "models" else {}
    for name, plugin in registry.plugins(kind).items():
        if name in lines or name.endswith("Pipeline"):  # a family of pipelines, which are chosen by folder
            continue
        try:
            found = registry.load(kind, name)
        except BenchError as error:
            lines[name] = f"[red]broken:[/red] {escape(str(error))}"
            continue
        preset = ", ".join(f"{key}={value}" for key, value in plugin.preset.items())
        text = (found.__doc__ or "(no description)").strip().partition("\n")[0]
        package = "" if plugin.package == "nabla-bench" else f" [{plugin.package}]"
        lines[name] = escape(text + (f" ({preset})" if preset else "") + package)
    return lines
