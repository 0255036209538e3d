"""The resumable training loop that every stage of the recipe shares."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class Recipe:
    """Where a run lives, what it runs on, and how long each stage is. Steps are optimiser steps.

    vae, text_encoder: folders of finished ones, where none is trained; unet: of one to begin from.
    """

    out: Path
    device: str
    seed: int
    steps: dict[str, int]
    bfloat16: bool = False
    vae: Path | None = None
    text_encoder: Path | None = None
    unet: Path | None = None


def fit(
    recipe: Recipe,
    stage: str,
    networks: dict[str, nn.Module],
    loss: Callable[[torch.Generator], torch.Tensor],
    lr: float,
    decay: float = 0.3,
    save_every: float = 60.0,
) -> None:
    """Train ``networks`` on ``loss(generator)``, then give them their averaged weights.

    Constant rate after 100 steps of warm-up, falling linearly over the last share ``decay``. A checkpoint is written
    by rename every ``save_every`` seconds and holds weights, averages, optimiser and generator: a killed run continues.
    """
    total, file = recipe.steps[stage], recipe.out / f"{stage}.pt"
    for network in networks.values():
        network.to(recipe.device).train()
    bundle = nn.ModuleDict(networks)
    optimizer = torch.optim.AdamW(bundle.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    average = {k: v.detach().clone() for k, v in bundle.state_dict().items()}
    step = 0
    if file.exists():
        saved = torch.load(file, map_location=recipe.device, weights_only=True)
        bundle.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"].cpu())
        average, step = saved["average"], saved["step"]
    saved_at = time.monotonic()
    precision = torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.bfloat16)
    with tqdm(total=total, initial=step, desc=stage, mininterval=2) as bar:
        while step < total:
            rate = min(1.0, (step + 1) / 100, (total - step) / (decay * total))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            with precision:
                value = loss(generator)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(bundle.parameters(), 1.0)
            optimizer.step()
            step += 1
            _update_average(average, bundle, min(0.999, (1 + step) / (10 + step)))
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
            if step == total or time.monotonic() - saved_at > save_every:
                state = {"weights": bundle.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                torch.save(state | {"generator": generator.get_state(), "step": step}, file.with_suffix(".partial"))
                os.replace(file.with_suffix(".partial"), file)
                saved_at = time.monotonic()
    bundle.load_state_dict(average)
    bundle.eval().requires_grad_(False)


def _update_average(average: dict[str, torch.Tensor], bundle: nn.Module, decay: float) -> None:
    current = bundle.state_dict()
    smooth = [key for key, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in smooth], [current[key] for key in smooth], 1 - decay)
    for key in current.keys() - set(smooth):  # counters of batch normalisation
        average[key].copy_(current[key])


def restore(recipe: Recipe, stage: str, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Load the averaged weights of ``stage``'s last checkpoint, finished or not. FileNotFoundError if there is none."""
    saved = torch.load(recipe.out / f"{stage}.pt", map_location=recipe.device, weights_only=True)
    bundle = nn.ModuleDict(networks).to(recipe.device)
    parameters = bundle.state_dict().keys()
    bundle.load_state_dict({name: value for name, value in saved["average"].items() if name in parameters})
    bundle.eval().requires_grad_(False)
    return networks
