"""Pictures of finished samples: images beside the prior's, or points over the exact target's density."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.core import Core
from bench.evaluation.statistics import target_draws, target_points
from bench.evaluation.target import Tilted
from bench.metric import Evaluation, Measurement, Samples
from bench.models.analytic import AnalyticModel
from bench.reporting.components import plot_components
from bench.reporting.plots import plot_samples
from bench.reporting.points import plot_points
from bench.runtime.files import write_atomic
from bench.sampling.noise import generator


def draw_samples(
    evaluation: Evaluation, measurements: Sequence[Measurement], core: Core, folder: Path, title: str
) -> None:
    """Write `samples.png`; for an analytic model also `points.npz`, what the picture shows.

    Where the target is known, `components.png` has samples of it too, sorted by component.
    """
    if isinstance(core.model, AnalyticModel):
        _points(evaluation, {one.name: one for one in measurements}, core, folder, title)
    else:
        if evaluation.targets:
            _components(evaluation, evaluation.targets, core, folder / "components.png", title)
        draw_images(evaluation, folder / "samples.png", title)


def _points(
    evaluation: Evaluation, measurements: dict[str, Measurement], core: Core, folder: Path, title: str, size: int = 160
) -> None:
    """Samples in two dimensions over the exact target's density; the limits depend on prior and target alone."""
    (points, _), (draws, _, _) = target_points(evaluation), next(target_draws(evaluation, 1))
    reach = 1.2 * float(points.abs().max())
    axis = torch.linspace(-reach, reach, size)
    grid = torch.stack([axis.repeat(size), axis.repeat_interleave(size)], 1).to(core.model.device)
    tilt = evaluation.beta * core.reward_model(grid, [""] * len(grid))
    assert isinstance(core.model, AnalyticModel)
    density = torch.softmax((core.model.log_density(grid) + tilt).double(), 0).view(size, size).cpu().numpy()
    sets = {"prior": evaluation.prior.images, "target": draws, "finetuned": evaluation.finetuned.images}
    arrays: dict[str, Any] = {name: samples.numpy() for name, samples in sets.items()}
    extent = np.array([-reach, reach, -reach, reach])
    data = io.BytesIO()
    np.savez_compressed(data, density=density.astype(np.float32), extent=extent, **arrays)
    write_atomic(folder / "points.npz", data.getvalue())
    name = "tilt_sw2"
    distances = {}
    if f"{name}/floor" in measurements:
        one, floor = measurements[name], measurements[f"{name}/floor"]
        distances = {"prior": one.prior, "target": floor.value, "finetuned": one.value}
    panels = {}
    for set_name, samples in sets.items():
        reward = float(core.reward_model(samples.to(core.model.device), [""] * len(samples)).mean())
        distance = f"SW2 {distances[set_name]:.3f}, " if distances else ""
        heading = "draws of the target itself" if set_name == "target" else set_name
        panels[f"{heading}\n{distance}reward {reward:.3f}"] = arrays[set_name]
    plot_points(panels, density, extent, folder / "samples.png", title)


@torch.no_grad()
def _components(
    evaluation: Evaluation, targets: Mapping[str, Tilted], core: Core, path: Path, title: str, most: int = 6
) -> None:
    """Samples of the prior, the target and the finetuned model, by component, for a few prompts."""
    panels = {}
    for heading, rows in pairs(evaluation, most).items():
        prompt = evaluation.finetuned.prompts[int(rows[0])]
        target = targets[prompt]
        drawn = target.draws(len(rows), generator(0, "select", "picture", prompt))
        images = core.model.decode(drawn.view(-1, *core.model.latent_shape).to(core.model.device)).cpu()
        shown = {"target": ((images * 255).round().byte(), drawn)}
        for name, samples in (("prior", evaluation.prior), ("finetuned", evaluation.finetuned)):
            assert samples.latents is not None
            shown[name] = samples.images[rows], samples.latents[rows]
        panels[heading] = {
            name: (shown[name][0].permute(0, 2, 3, 1).numpy(), target.nearest(shown[name][1]).numpy())
            for name in ("prior", "target", "finetuned")
        }
    names = next(iter(targets.values())).mixture.names
    plot_components(panels, names, path, f"{title}\nsamples in the order of their components")


def pairs(evaluation: Evaluation, prompts: int = 8) -> dict[str, torch.Tensor]:
    """Headings, a split and a prompt of it ("train: a cat"), and its rows: of training and test prompts the first ones.

    Without test prompts, of validation prompts.
    """
    parts = {split: evaluation.finetuned.rows(split) for split in dict.fromkeys(evaluation.finetuned.splits)}
    if "test" in parts:
        parts.pop("validation", None)
    each = prompts // len(parts)
    return {f"{split}: {p}": rows for split, groups in parts.items() for p, rows in list(groups.items())[:each]}


def draw_images(evaluation: Evaluation, path: Path, title: str, each: int = 4) -> None:
    """The first samples of a few prompts, prior above, finetuned below."""
    chosen = pairs(evaluation)
    rows = torch.stack(list(chosen.values()))

    def of(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        images = samples.strip(rows[:, :each]).permute(0, 1, 3, 4, 2)
        return images.numpy(), samples.rewards[evaluation.reward][rows].numpy()

    (prior, prior_rewards), (finetuned, finetuned_rewards) = of(evaluation.prior), of(evaluation.finetuned)
    said = f"{title}\nreward: mean ± standard deviation of a prompt's {rows.shape[1]} samples, on the same noise"
    plot_samples(prior, finetuned, list(chosen), path, said, prior_rewards, finetuned_rewards)
