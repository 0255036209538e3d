"""nabla-bench: one sampler and one evaluation for every reward-finetuning method of diffusion models.

The names below are what a plugin author imports; `run`, `load`, `evaluate` and `report` are for scripts. They load on
first use, so that the command line answers at once.
"""

import os
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A wheel holds methods, rewards and metrics inside this package; in a checkout they lie beside its folder.
if not (Path(__file__).parent / "methods").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

# Read once, when torch is loaded: threads that spin while they wait bring a run beside another job to a standstill.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_PUBLIC = {
    "Batch": "bench.sampling.trajectory",
    "Conditioning": "bench.model",
    "Config": "bench.options",
    "Copy": "bench.method",
    "Core": "bench.core",
    "Deviation": "bench.training.advantages",
    "DiffusionModel": "bench.model",
    "Evaluation": "bench.metric",
    "Kernel": "bench.sampling.kernel",
    "Loss": "bench.method",
    "Measurement": "bench.metric",
    "Method": "bench.method",
    "Metric": "bench.metric",
    "NFE": "bench.method",
    "Needs": "bench.method",
    "Noised": "bench.sampling.trajectory",
    "PromptStatistics": "bench.training.advantages",
    "Reward": "bench.reward",
    "Samples": "bench.metric",
    "Trajectory": "bench.sampling.trajectory",
    "Transitions": "bench.sampling.trajectory",
    "group_advantages": "bench.training.advantages",
    "group_baseline": "bench.training.advantages",
    "group_normalised": "bench.training.advantages",
    "group_tilt": "bench.training.advantages",
    "best_and_worst": "bench.training.advantages",
    "evaluate": "bench.python",
    "gaussian_log_prob": "bench.sampling.kernel",
    "leave_one_out": "bench.training.advantages",
    "load": "bench.python",
    "log_softmax_by_prompt": "bench.training.advantages",
    "report": "bench.python",
    "run": "bench.python",
}

__all__ = sorted(_PUBLIC)
__version__ = version("nabla-bench")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bench' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
