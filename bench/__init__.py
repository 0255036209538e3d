"""nabla-bench: one sampler and one evaluation for every reward-finetuning method of diffusion models.

The names in `__init__.pyi` are what a plugin author imports; `run`, `load`, `evaluate` and `report` are for scripts.
They load on first use, so that the command line answers at once.
"""

import logging
import os
from importlib.metadata import version
from pathlib import Path

import lazy_loader

# A wheel holds methods, rewards and metrics inside this package; in a checkout they lie beside its folder.
if not (Path(__file__).parent / "methods").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

# Read once, when torch is loaded: threads that spin while they wait bring a run beside another job to a standstill.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Where torchao is installed diffusers loads it, and both tell every user what only their programmers can act on.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("nabla-bench")
