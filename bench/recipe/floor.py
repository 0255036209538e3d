"""How near the finetuned part can come to a known target: ``python -m bench.recipe.floor``.

It is fitted to samples of the target itself, by maximum likelihood of whole sampling paths. No method that only sees
rewards can be expected to come nearer, so what is left is the floor that the network sets.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench import config as configs
from bench.core import Core
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.target import Tilted
from bench.hub import project_cache
from bench.metric import Measurement
from bench.prompts import load_prompts
from bench.runs.build import build_core
from bench.runs.progress import evaluate
from bench.sampling.noise import generator

TRAJECTORIES = 96  # of an update, as many as in a run


def fit(core: Core, targets: dict[str, Tilted], prompts: list[str], updates: int, lr: float) -> None:
    """Minimise `E_{p*} Σ_k ‖z_{k+1} − μ_θ(z_k)‖² / 2σ_k²` over paths of the prior, drawn by the weights `exp(βr)`.

    Its minimum is the process whose finished samples have the target's distribution. The rate falls to zero over the
    last half.
    """
    parameters = list(core.model.adapters().values())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for update in track(range(updates), "fitting"):
        optimizer.param_groups[0]["lr"] = lr * min(1, 2 * (1 - update / updates))
        rng = generator(0, "select", "floor", step=update)
        names = []
        for i in rng.integers(len(prompts), size=TRAJECTORIES):
            weights = targets[prompts[i]].weights.numpy()
            names.append((prompts[i], int(rng.choice(len(weights), p=weights))))
        path = core.rollout(core.batch(names), purpose="target", seed=0, prior=True)  # the very paths of the draws
        optimizer.zero_grad()
        for k in range(core.kernel.steps):
            z = path.latents[:, k]
            mean = core.kernel.mean(z, core.predict(z, k, path.conditioning), k)
            error = ((path.latents[:, k + 1] - mean) / core.kernel.std(k, z)).square().flatten(1).sum(1)
            (error.mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        optimizer.step()


def measure(model: str, reward: str, updates: int, lr: float, out: Path) -> list[Measurement]:
    """Fit, evaluate as a run is evaluated, and store the fitted part in `out`."""
    config = configs.resolve("prior", reward=reward, overrides={"model.name": model})
    core = build_core(config)
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    evaluator = Evaluator(core, config, prompts, project_cache())
    targets = evaluator.targets()
    assert targets is not None, f"{model} has no known density"
    fit(core, targets, prompts.train[: config.evaluation.train_prompts], updates, lr)
    core.model.save(out)
    return evaluate(evaluator, Console())[1]


def main(
    model: str = "emoji_mixture",
    reward: str = "emoji_style",
    updates: int = 2000,
    lr: float = 2e-3,
    out: Annotated[Path, typer.Option(help="folder of the fitted part and its figures")] = Path("runs/floor"),
) -> None:
    """Fit the finetuned part of MODEL to the target of REWARD, at the suite's β, and measure what is left."""
    torch.set_num_threads(1)
    measurements = measure(model, reward, updates, lr, out)
    figures = {one.name: [one.prior, one.value] for one in measurements}
    (out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf8")
    typer.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
