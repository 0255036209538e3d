"""Training on the random pipeline for test_processes.py, here or as one of several processes.

torchrun --nproc-per-node 2 two_processes.py PIPELINE METHOD:FOLDER:STOP[:OPTION…] …

OPTION: a setting `model.…` that is then true.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from scaffold import Brightness, pipeline_model
from torch.distributed.tensor import DTensor

from bench import Batch, Config, Core, Loss, Method, Needs
from bench.diagnose.selftest.scaffold import method_of, perturb
from bench.errors import BenchError, NonFiniteError
from bench.models.stable_diffusion import StableDiffusion
from bench.runtime import processes
from bench.sampling.grids import ddim_kernel
from bench.settings import OptimizerConfig, TrainConfig
from bench.training.trainer import Trainer

METHODS = ("nabla_gfn", "draft", "dag_kl", "lopsided")
# by method, with their options: one repeats a shard, one samples with a copy of the adapters, calls of one differ
SHARDED = {"nabla_gfn": ("shard",), "nft": ("shard",), "adjoint_matching": ("shard", "checkpointing")}
PROMPTS = ["cat", "dog", "red bird"]


class Lopsided(Method):
    """The first shards train the policy, the last the flow network alone; a DDP wrapper would get this wrong."""

    needs = Needs(rewards=True, record=frozenset({"model_output"}))

    def networks(self, model: StableDiffusion) -> dict[str, torch.nn.Module]:
        return {"flow": model.latent_network([32, 32])}

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        z, k = data.latents[:, 1], torch.ones(len(data), dtype=torch.long)
        if "red bird" not in data.prompts:
            yield Loss(core.predict(z, k, data.conditioning).square().flatten(1).mean(1) * (1 + data.rewards))
        flow = core.network("flow", z, k, data.conditioning)
        yield Loss((flow - data.model_output[:, 1]).square().flatten(1).mean(1))


class Failing(Method):
    """The second process runs out of memory between two calls of the network, or is not finite after them."""

    def __init__(self, error: type[Exception]):
        super().__init__(Config())
        self.error = error

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        z, k = data.latents[:, 1], torch.ones(len(data), dtype=torch.long)
        fails = processes.state().process_index == 1
        for late in (False, True):
            yield Loss(core.predict(z, k, data.conditioning).flatten(1).mean(1))
            if fails and late == (self.error is NonFiniteError):
                raise self.error("out of memory" if self.error is torch.OutOfMemoryError else "not finite")


FAILING = {"exhausted": torch.OutOfMemoryError, "nonfinite": NonFiniteError}


def frozen(network: torch.nn.Module) -> tuple[int, int]:
    """Frozen numbers of a denoiser, and how many of them this process holds."""
    parameters = [p for p in network.parameters() if not p.requires_grad]
    held = sum((p.to_local() if isinstance(p, DTensor) else p).untyped_storage().nbytes() // 4 for p in parameters)
    return sum(p.numel() for p in parameters), held


def train(pipeline: str | Path, folder: str | Path, name: str, stop: int = 0, **options: bool) -> None:
    """Two updates, or until `stop`, going on from what is in `folder`; the log's records go there too."""
    model = pipeline_model(Path(pipeline), **options)
    all_of_it, held = frozen(model.network)
    kernel = ddim_kernel(model.spec.alphas_cumprod, 4, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    perturb(model, 0.1)  # away from the start, where gradients are so small that Adam would enlarge their rounding
    core = Core(model, kernel, Brightness(Config()), beta=1000.0, micro_batch=2, sample_batch=2)
    core.meter.watch(model.network)
    if name in FAILING:
        method = Failing(FAILING[name])
    elif name == "lopsided":
        method = Lopsided(Config())
    else:
        options = {"fraction": 0.5} if name == "nabla_gfn" else {}  # a step whose flow learns, besides the last
        method = method_of(name, channels=[32, 32], **options)
    # 3 prompts x 2 samples in one update of 3 shards: two processes have two and one
    settings = TrainConfig(
        updates=stop or 2, prompts_per_round=3, samples_per_prompt=2, updates_per_round=1, checkpoint_every=1
    )
    trainer = Trainer(core, method, PROMPTS, settings, OptimizerConfig(lr=1e-3), Path(folder))
    trainer.resume()
    records: list[dict] = []
    share = held / all_of_it
    trainer.run(lambda record: records.append(record | {"processes": processes.count(), "share": share}))
    if processes.is_main():
        (Path(folder) / f"records-{stop}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for task in sys.argv[2:]:
        name, folder, stop, *options = task.split(":")
        try:
            train(sys.argv[1], folder, name, int(stop), **dict.fromkeys(options, True))
        except BenchError as error:
            Path(f"{folder}-{processes.state().process_index}.txt").write_text(f"{type(error).__name__}: {error}")
