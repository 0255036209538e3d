"""What is judged, in a model: a run's own adapter, adapters of others, or another denoiser."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.errors import BenchError
from bench.model import DiffusionModel
from bench.models.checks import check_network, check_pipeline, quiet_libraries
from bench.models.elsewhere.adapters import add_adapters
from bench.models.elsewhere.sources import digest, is_adapter, staged
from bench.models.folder import family_of, header, read
from bench.models.pipeline import PipelineModel
from bench.runtime.finite import require_finite_weights
from bench.settings import RunConfig


def install(model: DiffusionModel, folder: Path, config: RunConfig) -> None:
    """Let the model predict with the weights that `stage` has put into `folder`; its prior stays what it was.

    Raises BenchError for files that changed since, are damaged, or do not fit the model whole.
    """
    quiet_libraries()
    judged: Any = config.method
    if digest(sources := staged(folder)) != judged.digest:
        raise BenchError(f"the weights in {folder} are not those that were judged: put them back, or judge them anew.")
    places = [folder / source.name for source in sources]
    if config.model.finetune != "none":  # as the run has loaded it that wrote it
        load_adapter(model, places[0])
        return
    if not isinstance(model, PipelineModel):
        raise BenchError(f"{config.model.name!r} is no pipeline: of it, an adapter that a run wrote is judged alone.")
    if any((place / name).is_file() for place in places for name in ("config.json", "model_index.json")):
        model.adopt_denoiser(_denoiser(model, places[0]))
        return
    (file,) = places[0].glob("*.safetensors")
    if is_adapter(file):
        add_adapters(model, places, judged.scales)
    else:
        model.adopt_denoiser(_of_file(model, file))


def load_adapter(model: DiffusionModel, folder: Path) -> None:
    """Load an adapter's weights into the model. Raises BenchError for files that are damaged or do not fit it."""
    try:
        model.load(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise BenchError(
            f"the adapter in {folder} is damaged or of another version ({error}): run the command that made it again, "
            "with another --out."
        ) from error


def _denoiser(model: PipelineModel, folder: Path) -> nn.Module:
    """The denoiser of a folder: its own, or that of a whole pipeline which differs in nothing else."""
    kind = type(model.network)
    if (folder / "model_index.json").is_file():
        if (family := family_of(folder)) is not type(model):
            raise BenchError(
                f"{folder} is a {family.pipeline_class.__name__}, and {model.config.name!r} is a "
                f"{model.pipeline_class.__name__}: give --model a pipeline of its family."
            )
        predicts = check_pipeline(folder, family, guidance=1, only={"scheduler", model.denoiser}).spec.output
        if predicts != model.output:
            raise BenchError(f"{folder} predicts {predicts}, and {model.config.name!r} {model.output}.")
        _require_same_parts(model, folder)
        folder = folder / model.denoiser
    stored = read(folder / "config.json").get("_class_name")
    if stored != kind.__name__:
        raise BenchError(f"{folder} holds a {stored}, and the denoiser of {model.config.name!r} is a {kind.__name__}.")
    check_network(folder, kind.__name__)
    network = kind.from_pretrained(folder, dtype=_dtype(model), use_safetensors=True, local_files_only=True)
    return _fitting(model, network, folder)


def _of_file(model: PipelineModel, file: Path) -> nn.Module:
    """The denoiser of a single file, by diffusers' names of its tensors or by those of its authors."""
    kind, stored = type(model.network), header(file)
    if stored.keys() & model.network.state_dict().keys():
        _require_fit(model, stored, file)
        network = kind.from_config(model.network.config)
        network.load_state_dict(load_file(file))
        return _fitting(model, network, file)
    try:
        options = {"config": str(model.folder), "subfolder": model.denoiser, "local_files_only": True}
        network = kind.from_single_file(str(file), dtype=_dtype(model), **options)
    except Exception as error:  # whatever a library raises over files of the user's
        raise BenchError(
            f"{file} holds no {kind.__name__} like that of {model.config.name!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]})."
        ) from error
    return _fitting(model, network, file)


def _fitting(model: PipelineModel, network: nn.Module, origin: Path) -> nn.Module:
    """The network, if its tensors are those of the model's by name and shape, and finite."""
    state = network.state_dict()
    _require_fit(model, {name: tensor for name, tensor in state.items() if not tensor.is_meta}, origin)
    require_finite_weights(state.items(), origin)
    return network


def _require_fit(model: PipelineModel, tensors: Mapping[str, Tensor], origin: Path) -> None:
    theirs, ours = ({k: list(v.shape) for k, v in one.items()} for one in (tensors, model.network.state_dict()))
    if different := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
        first = different[0]
        raise BenchError(
            f"{origin} is no denoiser like that of {model.config.name!r}: {len(different)} of its tensors are missing, "
            f"unknown or of another shape, such as {first} ({theirs.get(first, 'none')}; the model's is "
            f"{ours.get(first, 'none')})."
        )


def _require_same_parts(model: PipelineModel, folder: Path) -> None:
    """Raise BenchError if a pipeline's text encoders or autoencoder hold other weights than the model's."""
    for part, network in model.pipeline.components.items():
        if part == model.denoiser or not isinstance(network, nn.Module):
            continue
        ours = network.state_dict()
        for file in sorted((folder / part).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if name in ours and not torch.equal(ours[name].cpu(), tensor.to(ours[name].dtype)):
                    raise BenchError(
                        f"{folder}: its {part} holds other weights than that of {model.config.name!r} ({name}), and a "
                        f"finetuned {model.denoiser} alone is judged: give {folder / model.denoiser} to judge that."
                    )


def _dtype(model: PipelineModel) -> torch.dtype:
    return next(model.network.parameters()).dtype
