"""Pictures of finished samples: images beside the prior's, or points over the exact target's density."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.core import Core
from bench.evaluation.samples import Evaluation
from bench.evaluation.statistics import target_draws, target_points
from bench.files import write_atomic
from bench.models.analytic import AnalyticModel
from results.plots import plot_samples
from results.points import plot_points


def draw_samples(evaluation: Evaluation, core: Core, folder: Path, title: str) -> None:
    """Write `samples.png`; for an analytic model also `points.npz`, what the picture shows."""
    if isinstance(core.model, AnalyticModel):
        _points(evaluation, core, folder, title)
    else:
        _images(evaluation, folder / "samples.png", f"{title}: same prompts, same noise")


def _points(evaluation: Evaluation, core: Core, folder: Path, title: str, size: int = 160) -> None:
    """Samples in two dimensions over the exact target's density; the limits depend on prior and target alone."""
    (points, _), (draws, _, _) = target_points(evaluation), next(target_draws(evaluation, 1))
    reach = 1.2 * float(points.abs().max())
    axis = torch.linspace(-reach, reach, size)
    grid = torch.stack([axis.repeat(size), axis.repeat_interleave(size)], 1).to(core.model.device)
    tilt = evaluation.beta * core.reward_model(grid, [""] * len(grid))
    density = torch.softmax((core.model.log_density(grid) + tilt).double(), 0).view(size, size).cpu().numpy()
    sets = {"prior": evaluation.prior.images, "target": draws, "finetuned": evaluation.finetuned.images}
    arrays = {name: samples.numpy() for name, samples in sets.items()}
    extent = np.array([-reach, reach, -reach, reach])
    data = io.BytesIO()
    np.savez_compressed(data, density=density.astype(np.float32), extent=extent, **arrays)
    write_atomic(folder / "points.npz", data.getvalue())
    plot_points(arrays, density, extent, folder / "samples.png", f"{title}, over the exact target's density")


def _images(evaluation: Evaluation, path: Path, title: str, prompts: int = 8, each: int = 4) -> None:
    """The first samples of a few prompts of both splits, prior above, finetuned below."""
    groups = evaluation.finetuned.rows("train"), evaluation.finetuned.rows("heldout")
    half = prompts // 2 if groups[1] else prompts
    chosen = [*list(groups[0].items())[:half], *list(groups[1].items())[:half]]
    shown = torch.stack([rows[:each] for _, rows in chosen])

    def of(samples: Any) -> tuple[Any, Any]:
        return samples.images[shown].permute(0, 1, 3, 4, 2).numpy(), samples.rewards[evaluation.reward][shown].numpy()

    (prior, prior_rewards), (finetuned, finetuned_rewards) = of(evaluation.prior), of(evaluation.finetuned)
    plot_samples(prior, finetuned, [p for p, _ in chosen], path, title, prior_rewards, finetuned_rewards)
