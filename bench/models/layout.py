"""What a pipeline's folder says of itself, checked in a second, before anything loads.

A family names the classes of the parts that it reads (`PipelineModel.parts`) and the values of their configurations
that it can represent (`PipelineModel.rules`). Everything else is refused by file, key and value, and so are weights
whose names or shapes are not those of the configuration: the libraries would draw what is missing at random.
"""

import importlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bench.errors import BenchError

Family = Any  # a subclass of bench.models.pipeline.PipelineModel, which imports this module

DIFFUSION_SCHEDULERS = (  # on a schedule of β, read by their configurations alone
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
TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
QWEN_TOKENIZER = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
TEXT_ENCODER = ("CLIP", "T5", "Qwen3")  # how classes of transformers begin
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))  # of a tokenizer, one is enough
DESCRIBED = ("output", "spacing", "steps_offset", "shift", "tokens")  # of a `DiffusionModel`, for its kernel
PRECISIONS = {"F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}  # others count as float32
LFS = b"version https://git-lfs"

Configs = Mapping[str, Mapping[str, Any]]  # by part


@dataclass(frozen=True)
class Rule:
    """What a value of a configuration may be; wanted: in words."""

    holds: Callable[[Any, Configs], bool]
    wanted: str


def one_of(*values: Any) -> Rule:
    """One of the values."""
    return Rule(lambda value, _: value in values, " or ".join(map(repr, values)))


def as_many(of: Callable[[Configs], Any], wanted: str) -> Rule:
    """What the other parts' configurations say."""
    return Rule(lambda value, configs: value == of(configs), wanted)


def _is_size(value: Any, _: Configs) -> bool:
    sides = [value] if isinstance(value, int) else value
    return isinstance(sides, list | tuple) and len(sides) in (1, 2) and all(type(s) is int and s > 0 for s in sides)


SIZE = Rule(_is_size, "the latent's side, or its height and width")
SIDE = Rule(lambda value, _: type(value) is int and value > 0, "the latent's side")
LATENT_CHANNELS = as_many(lambda configs: configs["vae"]["latent_channels"], "as many as the autoencoder's latents")
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


def pipeline_class(folder: Path, supported: list[str]) -> str:
    """The class that `model_index.json` names. Raises BenchError for a folder without one, or another class."""
    path = folder / "model_index.json"
    kind = read(path).get("_class_name")
    if kind not in supported:
        raise BenchError(f"{path}: _class_name = {kind!r} is not supported; supported are {', '.join(supported)}.")
    return kind


def read(path: Path) -> dict[str, Any]:
    """A JSON object of a pipeline. Raises BenchError."""
    try:
        data = path.read_bytes()
        if data.startswith(LFS):
            raise ValueError("it is a Git LFS pointer: run `git lfs pull` there")
        tree = json.loads(data)
        if not isinstance(tree, dict):
            raise ValueError(f"it holds no JSON object but {tree!r:.40}")
        return tree
    except FileNotFoundError:
        raise BenchError(f"{path} is missing: copy or fetch the pipeline anew.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"cannot read {path}: {error}.") from None


def used_parts(folder: Path, kind: Family, t5: bool = True) -> dict[str, str]:
    """Classes by part of those that the family loads. Raises BenchError for a part that it has no place for.

    t5: with the parts that the family can do without.
    """
    path = folder / "model_index.json"
    found, left_out = {}, {*kind.unused, *(() if t5 else kind.optional)}
    places = {*kind.parts, *(name for name, value in kind.unused.items() if value is None)}
    for name, entry in read(path).items():
        if entry is None or (name in places and not (isinstance(entry, list) and len(entry) == 2)):  # diffusers fails
            raise BenchError(
                f"{path}: {name} = {json.dumps(entry)}; a part is written [library, class], one that is left out "
                "[null, null]."
            )
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None] or name in left_out:
            continue
        wanted = kind.parts.get(name, ())
        library, own = entry if len(entry) == 2 else (None, None)
        if own not in wanted or library not in ("diffusers", "transformers"):
            can = (
                f"it can be {', '.join(wanted)}" if wanted else f"the parts of this family are {', '.join(kind.parts)}"
            )
            raise BenchError(
                f"{path}: {name} = {entry!r} cannot be read by {kind.pipeline_class.__name__} here; {can}."
            )
        found[name] = own
    if absent := kind.parts.keys() - found.keys() - kind.optional:
        raise BenchError(f"{path} names no {', '.join(sorted(absent))}, which {kind.pipeline_class.__name__} needs.")
    return found


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers, which would break ours, and no advice meant for programmers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def check(
    folder: Path,
    kind: Family,
    guidance: float,
    only: Collection[str] | None = None,
    weights: bool = True,
    t5: bool = True,
) -> Any:
    """Raise BenchError for what the family cannot represent, by file, key and value, or for weights that do not fit.

    Returns as much of the model as kernels and further networks are made from. only: parts to look at; None: all.
    weights: whether they lie in the folder too. t5: see `used_parts`.
    """
    quiet_libraries()
    configs: dict[str, Mapping[str, Any]] = {}
    differences: dict[Path, Mapping[str, Any]] = {}
    pipe = SimpleNamespace(config=read(folder / "model_index.json"))  # of networks without storage
    for name, class_name in used_parts(folder, kind, t5).items():
        place = folder / name
        if only is not None and name not in only:
            continue
        if name == "scheduler":
            pipe.scheduler = _scheduler(place / "scheduler_config.json", class_name, kind.parts[name])
            configs[name] = pipe.scheduler.config
        elif name.startswith("tokenizer"):
            _tokenizer(place)
        elif class_name.startswith(TEXT_ENCODER):
            configs[name], differences[place] = _text_encoder(place, class_name, weights)
        else:
            network = _network(place, class_name)
            setattr(pipe, name, network)
            configs[name] = network.config
            if weights:
                differences[place] = _differences(network, place)
    for key, rule in kind.rules.items():
        part, _, name = key.partition(".")
        if only is not None and part != "scheduler":  # others speak of several parts
            continue
        if part in configs and name in configs[part] and not rule.holds(value := configs[part][name], configs):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            raise BenchError(
                f"{folder / part / file}: {name} = {value!r} cannot be represented as a "
                f"{kind.pipeline_class.__name__} here; it has to be {rule.wanted}."
            )
    for place, found in differences.items():
        _fit(found, place)
    described = SimpleNamespace(**{name: getattr(kind, name) for name in DESCRIBED}, guidance=guidance, folder=folder)
    try:
        kind.read_configs(described, pipe)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise BenchError(f"{folder / 'scheduler' / 'scheduler_config.json'} describes no schedule: {error}.") from None
    denoiser = getattr(pipe, kind.denoiser)
    described.latent_shape, shapes = kind.shapes(denoiser.config, configs.get("vae", {}))
    described._text_width = shapes["text"][-1]
    described.latent_network = partial(_latent_network, kind, described)
    if only is None:
        _try(kind, denoiser, pipe.vae, folder)
    return described


def _latent_network(kind: Family, described: Any, *arguments: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return kind.latent_network(described, *arguments, **options)


def _scheduler(path: Path, class_name: str, known: tuple[str, ...]) -> Any:
    config = read(path)
    if (own := config.get("_class_name", class_name)) not in known:
        raise BenchError(f"{path}: _class_name = {own!r} is not supported here; it can be {', '.join(known)}.")
    try:
        return getattr(importlib.import_module("diffusers"), class_name).from_config(config)
    except Exception as error:  # whatever a library raises over a configuration, the meaning is the same
        raise BenchError(f"{path} describes no {class_name}: {error}.") from None


def _tokenizer(folder: Path) -> None:
    if not any(all((folder / file).is_file() for file in files) for files in VOCABULARIES):  # the library takes none
        files = "; ".join(" and ".join(files) for files in VOCABULARIES)
        raise BenchError(f"{folder} holds no tokenizer: it needs one of {files}.")
    for file in folder.glob("*.json"):
        read(file)


def _network(folder: Path, class_name: str) -> nn.Module:
    """A diffusers network without storage, from its configuration, all of whose keys it must know."""
    kind, config = getattr(importlib.import_module("diffusers"), class_name), read(folder / "config.json")
    if (own := config.get("_class_name", class_name)) != class_name:
        raise BenchError(f"{folder / 'config.json'}: _class_name = {own!r}, and model_index.json says {class_name}.")
    try:
        with torch.device("meta"):
            network, unknown = kind.from_config(config, return_unused_kwargs=True)
    except Exception as error:  # whatever a library raises over a configuration, the meaning is the same
        raise BenchError(f"{folder / 'config.json'} describes no {class_name}: {error}.") from None
    for key, value in unknown.items():
        if not key.startswith("_") and value not in (None, False):
            raise BenchError(f"{folder / 'config.json'}: {key} = {value!r} is no option of the installed {class_name}.")
    return network


def _text_encoder(folder: Path, class_name: str, weights: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A text encoder's configuration, and how its weights differ from it, as the library sees both."""
    kind = getattr(importlib.import_module("transformers"), class_name)
    read(folder / "config.json")
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            state = _headers(folder, class_name) if weights else kind(config).state_dict()
        options = {"config": config, "state_dict": state, "device_map": "meta", "ignore_mismatched_sizes": True}
        _, found = kind.from_pretrained(None, output_loading_info=True, **options)
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(f"{folder / 'config.json'} describes no {class_name}: {error}.") from None
    return config.to_dict(), found


def _differences(network: nn.Module, folder: Path) -> dict[str, Any]:
    found = _headers(folder, type(network).__name__)
    network._fix_state_dict_keys_on_load(found)  # older names of the same tensors, as the library reads them
    wanted = network.state_dict()
    shared = found.keys() & wanted.keys()
    return {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": found.keys() - wanted.keys(),
        "mismatched_keys": [(n, found[n].shape, wanted[n].shape) for n in shared if found[n].shape != wanted[n].shape],
    }


def _fit(differences: Mapping[str, Any], folder: Path) -> None:
    unexpected = [name for name in differences["unexpected_keys"] if not name.endswith("position_ids")]  # no weights
    for what, names in (("lack", differences["missing_keys"]), ("also hold", unexpected)):
        if names := sorted(names):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BenchError(
                f"the weights in {folder} {what} {', '.join(names[:3])}{more}: they are not those of its config.json."
            )
    for name, found, wanted in sorted(differences["mismatched_keys"]):
        raise BenchError(
            f"the weights in {folder} hold {name} of shape {list(found)}; config.json says {list(wanted)}."
        )


def files_of(folder: Path, class_name: str) -> list[str]:
    """Names of the files of a part, as far as its class tells; of weights in several files, if their index is here."""
    if class_name.endswith("Scheduler"):
        return ["scheduler_config.json"]
    if class_name in (*TOKENIZER, *QWEN_TOKENIZER):
        return ["tokenizer_config.json"]
    return ["config.json", *_weight_files(folder, class_name)]


def _weight_files(folder: Path, class_name: str) -> list[str]:
    stem = "model" if class_name.startswith(TEXT_ENCODER) else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    named = read(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise BenchError(f"cannot read {index}: it has no weight_map.")
    return sorted(set(named.values()))


def _headers(folder: Path, class_name: str) -> dict[str, Tensor]:
    """The tensors of a part's safetensors files, without their contents."""
    files = _weight_files(folder, class_name)
    return {name: tensor for file in files for name, tensor in header(folder / file).items()}


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without their contents. Raises BenchError for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: torch.empty(own.get_shape(), dtype=PRECISIONS.get(own.get_dtype()), device="meta")
                for name, own in slices.items()
            }
    except FileNotFoundError:
        pickled = "; pickled weights (.bin) are not loaded" if list(path.parent.glob("*.bin")) else ""
        raise BenchError(f"{path} is missing{pickled}.") from None
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(LFS)) == LFS
        reason = "it is a Git LFS pointer: run `git lfs pull` there" if pointer else f"not a whole file ({error})"
        raise BenchError(f"cannot read the weights {path}: {reason}.") from None


@torch.no_grad()
def _try(kind: Family, denoiser: nn.Module, vae: nn.Module, folder: Path) -> None:
    """One pass through denoiser and decoder, of shapes alone."""
    shape, parts = kind.shapes(denoiser.config, vae.config)
    try:
        with torch.device("meta"):
            z, conditioning = torch.empty(1, *shape), {name: torch.empty(1, *own) for name, own in parts.items()}
            output = kind.denoise(denoiser, z, torch.empty(1), conditioning)
            images = vae.decode(kind.vae_latents(z, vae), return_dict=False)[0]
        if output.shape != z.shape or images.shape[:2] != (1, 3):
            raise ValueError(f"latents {list(z.shape)} become {list(output.shape)} and images {list(images.shape)}")
    except Exception as error:
        raise BenchError(f"the configurations of {kind.denoiser} and vae in {folder} do not fit: {error}.") from None
