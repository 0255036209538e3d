"""All published tables: what they hold, and what they took."""

from bench.publish.claims import Claim, markdown_table, published, tuning, untrained
from bench.shipped import shipped
from results.claims.wording import hours as hours_of
from results.claims.wording import listed


def _trials() -> list[dict[str, float]]:
    """What the trials of every tuned table cost."""
    return [tuned["cost"] for name in shipped("published") if (tuned := tuning(name))]


def runs_and_trials() -> Claim:
    runs = sum(published(name)["run"].nunique() for name in shipped("published"))
    trials = sum(cost["runs"] for cost in _trials())
    return Claim(f"{runs} runs and {trials} tuning trials", {"there are tuned tables": trials > 0})


def hours() -> Claim:
    trials = sum(cost["wall_seconds"] for cost in _trials()) / 3600
    every = trials + sum(hours_of(published(name)) for name in shipped("published"))
    return Claim(f"about {every:.0f} hours", {"more than one": every > 1})


def published_tables() -> Claim:
    pages = {"ring": "ring.md", "ring_flow": "ring_flow.md", "emoji": "emoji.md", "emoji_flow": "emoji_flow.md"}
    pages |= {f"{name}_little_noise": f"{name}.md#less-noise-in-the-finished-sample" for name in ("ring", "ring_flow")}
    pages |= {"emoji_small_rate": "emoji.md", "emoji_clip": "emoji.md#a-second-reward-prompt-alignment"}
    pages |= {"emoji_flow_colorfulness": "emoji_flow.md#a-second-reward-colourfulness"}
    pages |= {
        "emoji_mixture": "emoji_mixture.md",
        "emoji_mixture_colorfulness": "emoji_mixture.md#a-reward-inside-the-modes",
        "emoji_mixture_flow": "emoji_mixture.md#on-the-flow-path",
        "emoji_mixture_long": "emoji_mixture.md#more-updates",
        "preference_200": "over-optimisation.md",
        "verdict_emoji_flow": "frontiers.md",
    }
    lines = []
    for name in shipped("published"):
        every = published(name)
        first, page = every.iloc[0], pages.get(name, f"../results/published/{name}/report.md")
        trained, idle = every.loc[every["updates"] > 0, "method"].nunique(), untrained(every)
        methods = f"{trained}{f' plus {listed(idle)}' if idle else ''}"
        trials = str(tuning(name)["cost"]["runs"]) if tuning(name) else "–"
        counts = (methods, str(every["seed"].nunique()), str(every["run"].nunique()), trials)
        lines.append((f"[`{name}`]({page})", f"`{first['model']}`", f"`{first['reward']}`", *counts))
    return Claim(markdown_table(("table", "model", "reward", "methods", "seeds", "runs", "trials"), lines), {})
