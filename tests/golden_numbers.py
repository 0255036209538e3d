"""Numbers that published implementations produced (`tests/golden/README.md` says how)."""

import json
from contextlib import contextmanager
from functools import cache

import torch
from bench.methods.regression.forward_process import Regression
from scaffold import GOLDEN
from torch import Tensor

from bench.core import Core
from bench.models.analytic import GaussianFlowModel, GaussianModel
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel
from bench.sampling.kernel import Kernel
from bench.sampling.trajectory import Noised

TOLERANCE = 1e-5
LAST_TOLERANCE = 5e-5  # float32 at t = 1, where 1 − ᾱ cancels


@cache
def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def error(ours: Tensor | float, theirs: Tensor | list | float) -> float:
    """Largest relative error over rows, in the Euclidean norm of a row."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    ours = torch.as_tensor(ours).detach().double().reshape(theirs.shape)
    rows = len(theirs) if theirs.ndim else 1
    difference, size = (ours - theirs).reshape(rows, -1).norm(dim=1), theirs.reshape(rows, -1).norm(dim=1)
    return float((difference / size.clamp(min=1e-12)).max())


def kernel_of(case: dict, dtype: torch.dtype, sd_alphas_cumprod: Tensor) -> tuple[Kernel, Tensor]:
    """The kernel of a golden case, and the step of each row."""
    kernel = ddim_kernel(sd_alphas_cumprod, case["num_steps"], eta=1.0, steps_offset=1).to(dtype=dtype)
    position = case["position"]
    k = torch.tensor(position if isinstance(position, list) else [position] * 2)
    assert kernel.timesteps[k].tolist() == case["timestep"]
    return kernel, k


class Closed(GaussianModel):
    """The golden predictions: `0.3 z + 0.1 sin z`, finetuned `a z + b sin z + c cos z`."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.35, 0.1, 0.02]))

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        if prior:
            return 0.3 * z + 0.1 * torch.sin(z)
        a, b, c = self.weights
        return a * z + b * torch.sin(z) + c * torch.cos(z)


class Undulating(Reward):
    """The golden reward, of latents."""

    scale, source = "about 0", "tests/golden/README.md"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (0.5 * images + 0.3 * torch.sin(2 * images)).flatten(1).mean(1)


def double(value: list) -> Tensor:
    """Inputs are float32 numbers, used in float64."""
    return torch.tensor(value).double()


class Nothing(Reward):
    """No reward is asked for."""

    scale, source = "", ""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        raise AssertionError


class Given(GaussianFlowModel):
    """A flow whose predictions are given, by name; `policy` may be differentiated."""

    outputs: dict[str, Tensor]

    def predict(self, z, t, conditioning, *, prior=False, guided=True):
        return self.outputs["prior" if prior else self.name]

    name = "policy"

    @contextmanager
    def using(self, weights):
        self.name = weights["name"]
        yield
        self.name = "policy"


def given_core(levels: Tensor, **outputs: Tensor) -> Core:
    """A core whose step k has the noise level `levels[k]`, each row's own, and whose networks say `outputs`."""
    order, place = levels.unique(), torch.searchsorted(levels.unique(), levels)
    sigmas = torch.cat([order.flip(0), torch.zeros(1, dtype=levels.dtype)])
    model = Given(dtype=torch.float64)
    model.outputs = {name: value.double() for name, value in outputs.items()}
    core = Core(
        model, Kernel(1000 * sigmas[:-1], (1 - sigmas) ** 2, 1.0, "ddim", "flow", sigmas), Nothing(Config()), 1.0
    )
    core.copies.update({name: {"name": name} for name in outputs})
    vars(core)["steps"] = len(order) - 1 - place
    return core


def noised(core: Core, clean: Tensor, noise: Tensor, advantages: Tensor | None = None) -> Noised:
    names = [(str(i), 0) for i in range(len(clean))]
    k = core.steps
    z, target = core.kernel.noised(clean, noise, k), core.kernel.target(clean, noise, k)
    encoded = core.model.encode([""] * len(clean))
    return Noised([p for p, _ in names], names, encoded, torch.arange(len(clean)), k, clean, noise, z, target, None,
                  advantages)  # fmt: skip


def learned(method: Regression, core: Core, part: Noised) -> tuple[Tensor, Tensor, dict]:
    """The loss's mean over rows, its gradient in the policy's output, and what is logged."""
    choices = {"noised": lambda *_: iter([part]), "choose_steps": lambda *_, **__: torch.zeros(len(part), 1)}
    vars(core).update(choices)  # a core is frozen
    policy = core.model.outputs["policy"] = core.model.outputs["policy"].detach().requires_grad_()
    (loss,) = method.losses(core, part)
    loss.values.mean().backward()
    return loss.values.mean(), policy.grad, loss.metrics
