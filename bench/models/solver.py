"""The solver with which diffusers' own call of a pipeline samples as a kernel does."""

from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from bench.sampling.kernel import Kernel


def set_solver(pipe: Any, kernel: Kernel, *, flow: bool) -> dict[str, Any]:
    """Give a pipeline the kernel's solver; returns what else its call needs from the kernel.

    A diffusion gets DDIM with η. A flow whose solver is of higher order gets Euler's method on the kernel's grid.
    """
    if not flow:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        return {"eta": kernel.eta}
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = _EulerOn(kernel)
    return {}


class _EulerOn(FlowMatchEulerDiscreteScheduler):
    """Euler's method on the noise levels of a kernel."""

    def __init__(self, kernel: Kernel):
        super().__init__()
        assert kernel.sigmas is not None
        self.levels = kernel.sigmas[:-1].tolist()

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **unused: Any) -> None:  # type: ignore[override]
        super().set_timesteps(sigmas=self.levels, device=device)
