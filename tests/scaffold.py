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
from bench.diagnose.selftest.scaffold import method_of
from bench.method import Loss, Method
from bench.models.pipeline import PipelineModel
from bench.models.stable_diffusion import StableDiffusion
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel
from bench.sampling.trajectory import Trajectory
from bench.settings import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from bench.training.trainer import Trainer

BUILT_IN = registry.BUILT_IN["methods"]
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Files of tests that take tens of seconds. They run first, so that at the end no worker waits long for another.
LONG = {
    "test_processes", "test_selftest", "test_judge", "test_package", "test_stopping", "test_memory", "test_stages",
    "test_sweep", "test_docs", "test_page", "test_figures", "test_hub", "test_gpu", "test_machines", "test_notebook",
    "test_folders", "test_cli", "test_device", "test_mixture", "test_runs_of_families", "test_families",
}  # fmt: skip


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer over single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def pipeline_model(
    folder: Path,
    kind: type[PipelineModel] = StableDiffusion,
    *,
    guidance: float = 3.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    rank: int = 2,
    **options,
) -> PipelineModel:
    """The pipeline in `folder` with an adapter of a low rank; options: settings `model.…`."""
    config = ModelConfig(name=str(folder), **{"lora": LoraConfig(rank=rank)} | options)
    return kind.create(folder, config, guidance=guidance, device=device, seed=seed)


def by_family(names: Iterable[str], *also: str) -> list:
    """Parameters from names of methods; all but the first of each family, and `also`, are marked slow."""
    seen, parameters = set(), []
    for name in names:
        family = registry.BUILT_IN["methods"][name].target.partition(":")[0].split(".")[2]  # a folder or a file
        slow = family in seen and name not in also
        parameters.append(pytest.param(name, marks=[pytest.mark.slow] if slow else []))
        seen.add(family)
    return parameters


class Brightness(Reward):
    """Mean red minus mean blue: a smooth reward with a known gradient."""

    scale = "-1 to 1"
    source = "test"

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].flatten(1).mean(1) - images[:, 2].flatten(1).mean(1)


PROMPTS = ["cat", "dog", "fish"]


def small_method(name: str) -> Method:
    """A registered method with a small flow network, on several steps of a trajectory."""
    return method_of(name, fraction=0.4, trust=1.0, channels=[16, 16])


def trainer_of(core: Core, method: Method, folder: Path, updates: int = 6) -> Trainer:
    lag = method.recipe.get("train.data_lag", 0)
    train = TrainConfig(
        updates=updates, prompts_per_round=2, samples_per_prompt=2, data_lag=lag, checkpoint_every=1, micro_batch=4
    )
    return Trainer(core, method, PROMPTS, train, OptimizerConfig(lr=1e-2), folder)


def trained(model: PipelineModel, folder: Path) -> dict[str, Tensor]:
    """The adapter after three updates of `draft_1` with checkpoints in `folder`, or what is left of them."""
    kernel = ddim_kernel(model.spec.alphas_cumprod, 3, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    core = Core(model, kernel, Brightness(Config()), beta=10.0, micro_batch=8, sample_batch=8)
    trainer = trainer_of(core, small_method("draft_1"), folder, updates=3)
    trainer.resume()
    trainer.run(lambda record: None)
    return {name: parameter.detach() for name, parameter in model.adapters().items()}


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
