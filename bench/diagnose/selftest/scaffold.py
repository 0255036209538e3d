"""Small exact problems on which methods are checked, by `bench selftest` and by the tests."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench import registry
from bench.core import Core
from bench.method import Method
from bench.model import DiffusionModel
from bench.models.analytic import GaussianFlowModel, GaussianModel
from bench.options import Config
from bench.reward import Reward
from bench.sampling.grids import ddim_kernel, flow_kernel
from bench.sampling.noise import generator
from bench.sampling.trajectory import Batch

BETA = 2.0
DIRECTION = torch.tensor([1.3, -0.4], dtype=torch.float64)


class Linear(Reward):
    """`r(x) = w·x`, with w = DIRECTION."""

    scale, source = "any", "a test problem"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images @ DIRECTION.to(images)


class Wavy(Reward):
    """A bounded reward with curvature."""

    scale, source = "-2 to 2", "a test problem"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.sin(2 * images[:, 0]) + torch.cos(images[:, 1]) * images[:, 0]


class WavyWithoutGradient(Wavy):
    """The same, for methods that ask for no gradient of the reward."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts).detach()


def gaussian_core(
    steps: int,
    reward: type[Reward] = Linear,
    *,
    path: str = "diffusion",
    eta: float = 1.0,
    spacing: str = "leading",
    final: float | None = None,
    method: Method | None = None,
    device: torch.device | str = "cpu",
) -> Core:
    """A Gaussian prior in two dimensions, in float64, where every conditional law is known.

    path: "diffusion" or "flow". eta, spacing, final: of the sampler (`spacing` and `final` of a diffusion's alone).
    method: its extra networks and its copies of the adapters are part of the core. The prior is its own teacher.
    """
    kind = {"diffusion": GaussianModel, "flow": GaussianFlowModel}[path]
    model = kind(2, (0.7, -0.2), 0.6, dtype=torch.float64, device=device)
    if path == "flow":
        kernel = flow_kernel(steps, eta=eta, spacing=model.spec.spacing, dtype=torch.float64)
    else:
        assert model.spec.alphas_cumprod is not None
        kernel = ddim_kernel(
            model.spec.alphas_cumprod, steps, eta=eta, steps_offset=1, spacing=spacing, final_alpha=final
        )
    start = {name: parameter.detach().clone() for name, parameter in model.adapters().items()}
    return Core(
        model,
        kernel,
        reward(Config()),
        BETA,
        micro_batch=64,
        sample_batch=4096,
        networks=method.networks(model) if method else {},
        copies=dict.fromkeys(method.copies(), start) if method else {},
        teacher_model=None if method and not method.needs.teacher else (model, kernel),
    )


def method_of(name: str, **options: object) -> Method:
    """The registered method, with those of the options that it has."""
    method = registry.load("methods", name)
    return method(method.Config(**{key: value for key, value in options.items() if key in method.Config.model_fields}))


def perturb(model: DiffusionModel, scale: float = 0.3) -> None:
    """Move the adapters away from their start, where policy and prior are equal."""
    rng = generator(0, "weights", "perturb")
    for parameter in model.adapters().values():
        parameter.data += scale * torch.from_numpy(rng.standard_normal(tuple(parameter.shape), "float32")).to(parameter)


def perturb_networks(core: Core, scale: float = 0.02) -> None:
    """Move the method's extra networks away from their start, where the output layers are zero and stop gradients."""
    rng = generator(0, "weights", "perturb networks")
    for network in core.networks.values():
        for parameter in network.parameters():
            parameter.data += scale * torch.from_numpy(rng.standard_normal(tuple(parameter.shape))).to(parameter)


def sample_round(core: Core, method: Method, rows: int = 6) -> Batch:
    """A round as the trainer hands it to the method: three samples of every prompt."""
    batch = core.batch((f"prompt {i // 3}", i % 3) for i in range(rows))
    if not method.needs.trajectory:
        return batch
    with torch.no_grad():
        data = method.collect(core, batch, 0)
        if method.needs.rewards:
            data = replace(data, rewards=core.reward(data.latents[:, -1], data.prompts))
    return method.prepare(core, data)


def parameters_of(core: Core) -> dict[str, nn.Parameter]:
    """Everything that trains, by name; those of an extra network begin with the network's name and a dot."""
    networks = {f"{n}.{key}": p for n, network in core.networks.items() for key, p in network.named_parameters()}
    return {**core.model.adapters(), **networks}


def update(core: Core, method: Method, data: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one update, as the trainer sums them; a gradient that does not arrive is zero."""
    parameters, total = parameters_of(core), 0.0
    for parameter in parameters.values():
        parameter.grad = None
    for loss in method.losses(core, data):
        value = loss.values.sum() / len(data)
        value.backward()
        total += value.item()
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}


def moments(core: Core, *, prior: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [2] of the finished latent, and the part of that variance that comes from z_0.

    Exact: every step of the chain is affine in z.
    """
    mean, variance, from_start = (torch.full((2,), value, dtype=torch.float64) for value in (0.0, 1.0, 1.0))
    text = core.model.encode([""])
    with torch.no_grad():
        for k in range(core.kernel.steps):
            ends = [torch.full((1, 2), value, dtype=torch.float64) for value in (0.0, 1.0)]
            low, high = (core.kernel.mean(z, core.predict(z, k, text, prior=prior), k)[0] for z in ends)
            slope = high - low
            mean, from_start = low + slope * mean, slope**2 * from_start
            variance = slope**2 * variance + core.kernel.std(k, ends[0]) ** 2
    return mean, variance, from_start
