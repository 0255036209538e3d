"""A checkpoint in a single safetensors file becomes the folder that a run takes.

Of Stable Diffusion 1.x, 2.x and XL the file holds the whole pipeline, of the families that say so (`Family.alone`) the
denoiser alone. It holds tensors and nothing else. What they mean, what the networks predict above all, is read from a
pipeline's folder of the same architecture, and nothing is converted that does not fit it whole.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from bench import registry
from bench.errors import BenchError
from bench.hub import Repository
from bench.models import catalogue
from bench.models.checks import check_pipeline
from bench.models.family import Family
from bench.models.folder import family_of, header
from bench.models.hub_pipeline import CONFIGURATIONS
from bench.models.stable_diffusion import StableDiffusion
from bench.runtime.files import naming_disk_errors

DENOISER = "model.diffusion_model."  # how the names of its tensors begin in such a file
V_PREDICTION = "v_pred"  # a tensor that says so, in some
UNREAD = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.", "norm_final.weight")  # which no forward pass uses


def convert(file: Path, like: str, out: Path) -> str:
    """Write the pipeline's folder `out`; like: a pipeline with the file's configurations, by name, folder or hub id.

    Returns what the network predicts. Tensors keep their precision where all have the same 16 bits, and are stored in
    float32 otherwise. Raises BenchError for a file that is none or does not fit, or an `out` that exists.
    """
    if out.exists():
        raise BenchError(f"{out} exists already: choose another --out.")
    if file.suffix != ".safetensors":
        raise BenchError(f"{file} is no .safetensors file; pickled ones (.ckpt) are not loaded.")
    stored = header(file)
    configs = _configs(like)
    family = family_of(configs)
    if family.alone:
        return _convert_denoiser(file, family, like, out)
    if not issubclass(family, StableDiffusion):
        raise BenchError(
            f"--like {like} is a {family.pipeline_class.__name__}; files of Stable Diffusion are converted, and of "
            f"{', '.join(_alone())} those of a denoiser."
        )
    if not (denoiser := sum(name.startswith(DENOISER) for name in stored)):
        raise BenchError(f"{file} holds no {DENOISER}…: it is no whole checkpoint of Stable Diffusion.")
    spec = check_pipeline(configs, family, guidance=1, weights=False).spec
    if V_PREDICTION in stored and spec.output != "v_prediction":
        raise BenchError(
            f"{file} says that it predicts v, and {like!r} predicts {spec.output}: give --like a copy of its "
            "folder with prediction_type = v_prediction in scheduler/scheduler_config.json."
        )
    try:
        pipe = family.pipeline_class.from_single_file(
            str(file),
            config=str(configs),
            local_files_only=True,
            dtype=_precision(stored),
            **family.unused,
        )
    except Exception as error:  # whatever a library raises over files of the user's
        reason = f"{type(error).__name__}: {str(error).split('. ')[0].strip(' .')}"
        if isinstance(error, NotImplementedError):  # moving networks to memory that have tensors without values
            reason = "tensors of its denoiser or autoencoder are missing"
        raise BenchError(f"{file} is no pipeline like {like!r}: {reason}.") from error
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    _require_values(tensors, file, like)
    if (count := len(parts[family.denoiser].state_dict())) != denoiser:
        raise BenchError(f"{file} holds {denoiser} tensors of a denoiser, and the one of {like!r} has {count}.")
    with _written(out, family) as whole:
        pipe.save_pretrained(whole)
    return spec.output


def _convert_denoiser(file: Path, family: type[Family], like: str, out: Path) -> str:
    """`convert` of a file that holds a denoiser alone; the other parts are copied from `like`."""
    source = catalogue.pipeline_folder(like)
    blueprint = check_pipeline(source, family, guidance=1)
    state = load_file(file)
    if any(name.startswith(DENOISER) for name in state):  # of a file that may hold the other parts too
        state = {name.removeprefix(DENOISER): tensor for name, tensor in state.items() if name.startswith(DENOISER)}
    count = sum(tensor.numel() for name, tensor in state.items() if not name.startswith(UNREAD))
    kind = type(blueprint.network)
    try:
        network = kind.from_single_file(
            state, config=str(source / family.denoiser), local_files_only=True, dtype=_precision(state)
        )
    except Exception as error:  # whatever a library raises over files of the user's
        raise BenchError(
            f"{file} is no {kind.__name__} like that of {like!r}: {type(error).__name__}: {str(error).split('. ')[0]}."
        ) from error
    tensors = network.state_dict()
    _require_values(tensors, file, like)
    if count != (expected := sum(tensor.numel() for tensor in tensors.values())):
        raise BenchError(f"{file} holds {count} numbers of a denoiser, and the one of {like!r} has {expected}.")

    def weights(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == source / family.denoiser and ".safetensors" in name]

    with _written(out, family) as whole:
        shutil.copytree(source, whole, ignore=weights)
        network.save_pretrained(whole / family.denoiser)
    return blueprint.spec.output


def _alone() -> list[str]:
    """The families whose denoisers are read from files of their own."""
    return [name for name in registry.plugins("pipelines") if registry.load("pipelines", name).alone]


def _precision(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    precisions = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim()}
    return precisions.pop() if len(precisions) == 1 else torch.float32


def _require_values(tensors: Mapping[str, torch.Tensor], file: Path, like: str) -> None:
    """Raise BenchError for tensors that the library left without values."""
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise BenchError(f"{file} lacks {', '.join(absent[:3])}{more}, which a pipeline like {like!r} has.")


@contextmanager
def _written(out: Path, family: type[Family]) -> Iterator[Path]:
    """A folder to write a pipeline to, which becomes `out` at the end of the block, if it is whole."""
    with naming_disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
            yield (whole := Path(place) / out.name)
            check_pipeline(whole, family, guidance=1)
            shutil.move(whole, out)


def _configs(like: str) -> Path:
    """The folder with the configurations and tokenizers of a pipeline; of the hub's, no weights are fetched."""
    repository = catalogue.repository(like)
    if repository is None:
        folder = catalogue.locate(like)
        if folder is None:
            raise BenchError(f"--like {like}: it is no pipeline; give sd15, sd21, sdxl, a folder or a hub id.")
        return folder
    return Repository(repository.name, ("model_index.json",), also=CONFIGURATIONS[1:]).path()
