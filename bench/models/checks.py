"""A pipeline's folder, checked in a second before anything loads.

A family names the classes of the parts that it reads (`Family.parts`) and the values of their configurations that it
can represent (`Family.rules`). Everything else is refused by file, key and value. So are weights whose names or shapes
are not those of the configuration: the libraries would fill what is missing with random numbers.
"""

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError
from bench.models.family import Blueprint, Family
from bench.models.folder import headers, read, used_parts
from bench.settings import ModelConfig

DEFAULT = ModelConfig()
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))  # one of them is enough


def quiet_libraries() -> None:
    """No progress bars of diffusers and transformers, which would break ours, and no advice meant for programmers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


@dataclass
class _Contents:
    """What was read of a folder: configurations and networks by part, and how weights differ from them by folder."""

    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    differences: dict[Path, Mapping[str, Any]] = field(default_factory=dict)


def check_pipeline(
    folder: Path,
    family: type[Family],
    guidance: float,
    *,
    only: Collection[str] | None = None,
    weights: bool = True,
    config: ModelConfig = DEFAULT,
) -> Blueprint:
    """The pipeline in `folder`, without its weights.

    only: parts to look at; None: all. weights: whether they lie in the folder too. config: whose T5 and size hold.
    Raises BenchError for what the family cannot represent, by file, key and value, and for weights that do not fit.
    """
    quiet_libraries()
    contents = _read_parts(folder, family, only, weights, config.t5)
    contents.configs["picture"] = family.asked(config)
    _apply_rules(folder, family, contents.configs, only is None)
    for place, differences in contents.differences.items():
        _require_fit(differences, place)
    try:
        spec = family.describe(contents.configs)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise BenchError(f"{folder / 'scheduler' / 'scheduler_config.json'} describes no schedule: {error}.") from None
    spec.require_guidance(guidance, folder)
    blueprint = Blueprint(family, contents.networks, spec)
    if only is None:
        _try_shapes(blueprint, folder)
    return blueprint


def check_network(folder: Path, class_name: str) -> None:
    """Whether a folder holds a whole network of diffusers of this class. Raises BenchError."""
    quiet_libraries()
    _require_fit(_differences(_network(folder, class_name), folder), folder)


def _read_parts(folder: Path, family: type[Family], only: Collection[str] | None, weights: bool, t5: bool) -> _Contents:
    contents = _Contents({"pipeline": read(folder / "model_index.json")})
    for part, class_name in used_parts(folder, family, t5).items():
        place = folder / part
        if only is not None and part not in only:
            continue
        if part == "scheduler":
            contents.configs[part] = _scheduler(place / "scheduler_config.json", class_name, family.parts[part])
        elif part.startswith("tokenizer"):
            _tokenizer(place)
        elif part.startswith("text_encoder"):
            contents.configs[part], contents.differences[place] = _text_encoder(place, class_name, weights)
        else:
            network = contents.networks[part] = _network(place, class_name)
            contents.configs[part] = network.config
            if weights:
                contents.differences[place] = _differences(network, place)
    return contents


def _apply_rules(folder: Path, family: type[Family], configs: Mapping[str, Mapping[str, Any]], complete: bool) -> None:
    """complete: all parts were read; else only the scheduler's rules hold, as others speak of several parts."""
    for key, rule in family.rules.items():
        part, _, name = key.partition(".")
        if not complete and part != "scheduler":
            continue
        if part in configs and name in configs[part] and not rule.holds(value := configs[part][name], configs):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            raise BenchError(
                f"{folder / part / file}: {name} = {value!r} cannot be represented as a "
                f"{family.pipeline_class.__name__} here; it has to be {rule.wanted}."
            )


def _scheduler(path: Path, class_name: str, readable: tuple[str, ...]) -> Mapping[str, Any]:
    config = read(path)
    if (stored := config.get("_class_name", class_name)) not in readable:
        raise BenchError(f"{path}: _class_name = {stored!r} is not supported here; it can be {', '.join(readable)}.")
    try:
        return getattr(importlib.import_module("diffusers"), class_name).from_config(config).config
    except Exception as error:  # whatever a library raises over a configuration, the meaning is the same
        raise BenchError(f"{path} describes no {class_name}: {error}.") from None


def _tokenizer(folder: Path) -> None:
    if not any(all((folder / file).is_file() for file in files) for files in VOCABULARIES):  # the library takes none
        files = "; ".join(" and ".join(files) for files in VOCABULARIES)
        raise BenchError(f"{folder} holds no tokenizer: it needs one of {files}.")
    for file in folder.glob("*.json"):
        read(file)


def _network(folder: Path, class_name: str) -> Any:
    """A diffusers network without storage, from its configuration, all of whose keys it must know."""
    kind, config = getattr(importlib.import_module("diffusers"), class_name), read(folder / "config.json")
    if (stored := config.get("_class_name", class_name)) != class_name:
        raise BenchError(f"{folder / 'config.json'}: _class_name = {stored!r}, and model_index.json says {class_name}.")
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
            state = headers(folder) if weights else kind(config).state_dict()
        options = {"config": config, "state_dict": state, "device_map": "meta", "ignore_mismatched_sizes": True}
        _, differences = kind.from_pretrained(None, output_loading_info=True, **options)
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(f"{folder / 'config.json'} describes no {class_name}: {error}.") from None
    return config.to_dict(), differences


def _differences(network: Any, folder: Path) -> dict[str, Any]:
    stored = headers(folder)
    network._fix_state_dict_keys_on_load(stored)  # older names of the same tensors, as the library reads them
    expected = network.state_dict()
    shapes = {name: (stored[name].shape, expected[name].shape) for name in stored.keys() & expected.keys()}
    return {
        "missing_keys": expected.keys() - stored.keys(),
        "unexpected_keys": stored.keys() - expected.keys(),
        "mismatched_keys": [(name, *pair) for name, pair in shapes.items() if pair[0] != pair[1]],
    }


def _require_fit(differences: Mapping[str, Any], folder: Path) -> None:
    unexpected = [name for name in differences["unexpected_keys"] if not name.endswith("position_ids")]  # no weights
    for what, names in (("lack", differences["missing_keys"]), ("also hold", unexpected)):
        if names := sorted(names):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise BenchError(
                f"the weights in {folder} {what} {', '.join(names[:3])}{more}: they are not those of its config.json."
            )
    for name, stored, expected in sorted(differences["mismatched_keys"]):
        raise BenchError(
            f"the weights in {folder} hold {name} of shape {list(stored)}; config.json says {list(expected)}."
        )


@torch.no_grad()
def _try_shapes(blueprint: Blueprint, folder: Path) -> None:
    """One pass through denoiser and decoder, of shapes alone."""
    family, spec, vae = blueprint.family, blueprint.spec, blueprint.networks["vae"]
    try:
        with torch.device("meta"):
            z = torch.empty(1, *spec.latent_shape)
            output = family.denoise(blueprint.network, z, torch.empty(1), family.blank(spec))
            images = vae.decode(family.vae_latents(z, vae), return_dict=False)[0]
        if output.shape != z.shape or images.shape[:2] != (1, 3):
            raise ValueError(f"latents {list(z.shape)} become {list(output.shape)} and images {list(images.shape)}")
    except Exception as error:
        raise BenchError(f"the configurations of {family.denoiser} and vae in {folder} do not fit: {error}.") from None
