"""What several tests share: small models, rewards and trainers. Fixtures are in conftest.py."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from bench import registry
from bench.core import Core
from bench.method import Loss, Method
from bench.models.analytic import GaussianFlowModel, GaussianModel
from bench.models.stable_diffusion import StableDiffusion
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel, flow_kernel
from bench.sampling.noise import generator
from bench.sampling.trajectory import Batch, Trajectory
from bench.settings import OptimizerConfig, TrainConfig
from bench.training.trainer import Trainer

BUILT_IN = registry.BUILT_IN["methods"]
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer over single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def by_class(names: Iterable[str], *also: str) -> list:
    """Parameters from names of methods: the first preset of each class, and `also`, are of the ordinary suite."""
    seen, found = set(), []
    for name in names:
        target = registry.BUILT_IN["methods"][name].target
        found.append(pytest.param(name, marks=[pytest.mark.slow] if target in seen and name not in also else []))
        seen.add(target)
    return found


class Brightness(Reward):
    """Mean red minus mean blue: a smooth reward with a known gradient."""

    scale = "-1 to 1"
    source = "test"

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].flatten(1).mean(1) - images[:, 2].flatten(1).mean(1)


def perturb(model: StableDiffusion, scale: float = 0.3) -> None:
    """Move the adapters away from their start, where the finetuned model equals the prior."""
    rng = generator(0, "weights", "perturb")
    for parameter in model.adapters().values():
        parameter.data += scale * torch.from_numpy(rng.standard_normal(tuple(parameter.shape), "float32")).to(parameter)


PROMPTS = ["cat", "dog", "fish"]


def method_of(name: str) -> Method:
    """A registered method with its preset, its flow network small, on several steps a trajectory."""
    options = {key.removeprefix("method."): v for key, v in BUILT_IN[name].preset.items() if key.startswith("method.")}
    fields = registry.load("methods", name).Config.model_fields
    options |= {key: v for key, v in {"fraction": 0.4, "trust": 1.0, "channels": [16, 16]}.items() if key in fields}
    return registry.load("methods", name)(registry.load("methods", name).Config(**options))


def trainer_of(core: Core, method: Method, folder: Path, updates: int = 6) -> Trainer:
    lag = method.recipe.get("train.data_lag", 0)
    train = TrainConfig(
        updates=updates, prompts_per_round=2, samples_per_prompt=2, data_lag=lag, checkpoint_every=1, micro_batch=4
    )
    return Trainer(core, method, PROMPTS, train, OptimizerConfig(lr=1e-2), folder)


def parameters_of(core: Core) -> dict[str, nn.Parameter]:
    """Everything that trains, by name."""
    own = {f"{n}.{key}": p for n, net in core.networks.items() for key, p in net.named_parameters()}
    return {**core.model.adapters(), **own}


def update(core: Core, method: Method, data: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one update, zeros where nothing arrives."""
    total, parameters = 0.0, parameters_of(core)
    for parameter in parameters.values():
        parameter.grad = None
    for loss in method.losses(core, data):
        (loss.values.sum() / len(data)).backward()
        total += loss.values.sum().item() / len(data)
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}


BETA = 2.0


DIRECTION = torch.tensor([1.3, -0.4], dtype=torch.float64)


class Linear(Reward):
    """`r(x) = w·x`."""

    scale, source = "any", "test"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images @ DIRECTION


class Wavy(Reward):
    """A reward with curvature, bounded."""

    scale, source = "any", "test"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.sin(2 * images[:, 0]) + torch.cos(images[:, 1]) * images[:, 0]


def gaussian_core(
    steps: int,
    reward: type[Reward] = Linear,
    *,
    path: str = "diffusion",
    eta: float = 1.0,
    spacing: str = "leading",
    final: float | None = None,
) -> Core:
    kind = {"diffusion": GaussianModel, "flow": GaussianFlowModel}[path]
    model = kind(2, (0.7, -0.2), 0.6, dtype=torch.float64)
    if path == "flow":
        kernel = flow_kernel(steps, eta=eta, spacing=model.spacing, dtype=torch.float64)
    else:
        kernel = ddim_kernel(model.alphas_cumprod, steps, eta=eta, steps_offset=1, spacing=spacing, final_alpha=final)
    return Core(model, kernel, reward(Config()), BETA, micro_batch=64, sample_batch=4096)


def sample(core: Core, rows: int, first: int = 0, **options) -> Trajectory:
    """Trajectories of `rows` samples, each with its own prompt."""
    batch = core.batch((f"prompt {i}", 0) for i in range(first, first + rows))
    with torch.no_grad():
        return core.rollout(batch, record=frozenset({"model_output", "log_prob"}), **options)


def gradients(losses: Iterable[Loss], rows: int, parameters: Iterable[nn.Parameter]) -> tuple[float, Tensor]:
    """The loss of an update as the trainer sums it, and its gradient as one vector."""
    parameters, total = list(parameters), 0.0
    for parameter in parameters:
        parameter.grad = None
    for loss in losses:
        value = loss.values.sum() / rows
        value.backward()
        total += value.item()
    return total, torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])


def with_rewards(core: Core, data: Trajectory) -> Trajectory:
    return replace(data, rewards=core.reward(data.latents[:, -1], data.prompts).detach())
