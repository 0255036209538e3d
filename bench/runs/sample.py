"""`bench sample`: images from a trained adapter, and the prior's on the same noise."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from rich.console import Console

from bench.evaluation.draw import draw
from bench.evaluation.image_folder import save_images
from bench.evaluation.scores import score_samples
from bench.hub import obtain
from bench.metric import Samples
from bench.models.elsewhere.weights import load_adapter
from bench.prompts import load_prompts
from bench.reporting.plots import plot_samples
from bench.runs.adapter import trained
from bench.runs.build import build_core, evaluation_core, use_threads
from bench.runs.requirements import training_requirements

SHOWN = 8, 4  # prompts of the grid, and images of each


def sample(
    folder: Path,
    prompts: list[str],
    each: int,
    seed: int | None,
    out: Path | None,
    console: Console,
    metadata: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Path:
    """Draw `each` images of every prompt into a folder: files, `index.csv` and the grid `samples.png`.

    prompts: empty takes the run's own test prompts. seed: of the noise; None: the evaluation's, so that samples of
    its prompts are those of the run. metadata: of the prompts, where the run's own does not know them.
    Returns the folder. Raises BenchError for a folder without an adapter of images.
    """
    config, weights = trained(folder)
    if not prompts:
        prompt_set = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
        prompts = (prompt_set.test or prompt_set.validation or prompt_set.train)[: SHOWN[0]]
    seed = seed if seed is not None else config.seed if config.evaluation.seed is None else config.evaluation.seed
    obtain(training_requirements(config))
    use_threads(config)
    core = evaluation_core(build_core(config), config)
    core.reward_model.set_metadata({**core.reward_model.metadata, **metadata})
    load_adapter(core.model, weights)
    names = [(prompt, index) for prompt in prompts for index in range(each)]
    sets: dict[str, Samples] = {}
    for name, prior in {"finetuned": False, "prior": True}.items():
        with console.status(f"drawing {len(names)} images ({name})"):
            sets[name] = draw(core, names, ["asked"] * len(names), seed=seed, prior=prior)
            sets[name] = score_samples(sets[name], {core.reward_name: core.reward_model}, core.micro_batch)
    out = out or folder / "drawn"
    save_images(out, sets, seed=seed, each=each)
    shown = [rows[: SHOWN[1]] for rows in sets["prior"].rows().values()][: SHOWN[0]]

    both = sets["prior"], sets["finetuned"]
    before, after = (np.stack([one.strip(rows).permute(0, 2, 3, 1).numpy() for rows in shown]) for one in both)
    rewards = [np.stack([one.rewards[core.reward_name][rows].numpy() for rows in shown]) for one in both]
    title = f"{config.method.name} on {config.reward.name} ({config.model.name}): same prompts, same noise"
    plot_samples(before, after, prompts[: SHOWN[0]], out / "samples.png", title, *rewards)
    return out
