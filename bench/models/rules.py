"""What a family of pipelines can represent: classes of parts, and rules for values of their configurations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError

DIFFUSION_SCHEDULERS = (  # on a schedule of β, which their configurations alone describe
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
FLOW_SOLVERS = (*FLOW_SCHEDULERS, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # of which the grid is read
TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
QWEN_TOKENIZER = ("Qwen2Tokenizer", "Qwen2TokenizerFast")

Configs = Mapping[str, Mapping[str, Any]]  # by part of the pipeline; "pipeline": its model_index.json


@dataclass(frozen=True)
class Rule:
    """Whether a value of a configuration can be represented; wanted: which can, in words."""

    holds: Callable[[Any, Configs], bool]
    wanted: str


def one_of(*values: Any) -> Rule:
    """The value is one of these."""
    return Rule(lambda value, _: value in values, " or ".join(map(repr, values)))


def fixed(part: str, **values: Any) -> dict[str, Rule]:
    """Rules for a part's configuration: these keys have these values."""
    return {f"{part}.{name}": one_of(value) for name, value in values.items()}


def equals(expected: Callable[[Configs], Any], wanted: str) -> Rule:
    """The value follows from the other parts' configurations."""
    return Rule(lambda value, configs: value == expected(configs), wanted)


def sides(picture: Mapping[str, Any], scale: int, multiple: int) -> tuple[int, int]:
    """A latent's height and width for the picture asked for; scale: pixels to a side of a latent's place.

    Raises BenchError for a height or width that is no multiple of `multiple`.
    """
    height, width = picture["height"], picture["width"]
    if height % multiple or width % multiple:
        raise BenchError(f"model.size = [{height}, {width}]: both have to be multiples of {multiple}.")
    return height // scale, width // scale


def _is_size(value: Any, _: Configs) -> bool:
    sides = [value] if isinstance(value, int) else value
    return isinstance(sides, list | tuple) and len(sides) in (1, 2) and all(type(s) is int and s > 0 for s in sides)


SIZE = Rule(_is_size, "the latent's side, or its height and width")
SIDE = Rule(lambda value, _: type(value) is int and value > 0, "the latent's side")
LATENT_CHANNELS = equals(lambda configs: configs["vae"]["latent_channels"], "as many as the autoencoder's latents")
AUTOENCODER = {"vae.latents_mean": one_of(None), "vae.latents_std": one_of(None)}
FLOW_SCHEDULER = {
    "scheduler.num_train_timesteps": one_of(None, 1000),
    "scheduler.shift_terminal": one_of(None),
    "scheduler.stochastic_sampling": one_of(None, False),
    "scheduler.invert_sigmas": one_of(None, False),
    "scheduler.use_karras_sigmas": one_of(None, False),
    "scheduler.use_exponential_sigmas": one_of(None, False),
    "scheduler.use_beta_sigmas": one_of(None, False),
}
FLOW_SOLVER = FLOW_SCHEDULER | {
    "scheduler.use_flow_sigmas": one_of(True),
    "scheduler.prediction_type": one_of("flow_prediction"),
    "scheduler.use_dynamic_shifting": one_of(None, False),
}


def flow_grid(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """`spacing` and `shift` of the grid that a pipeline makes of its number of steps alone.

    The levels of the solvers of higher order are those of "shifted" to 0.001 before the shift: theirs begin or end
    beside 0 and 1.
    """
    if "flow_shift" in scheduler:
        return {"spacing": "shifted", "shift": scheduler["flow_shift"]}
    return {"spacing": "sd3", "shift": scheduler["shift"]}
