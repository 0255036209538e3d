"""A checkpoint in a single safetensors file (Stable Diffusion 1.x, 2.x and XL) becomes the folder that a run takes.

The file holds tensors alone. What they mean, what the networks predict above all, is read from a pipeline's folder of
the same architecture, and nothing is converted that does not fit it whole.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from bench.errors import BenchError
from bench.hub import Repository
from bench.models import catalogue
from bench.models.checks import check_pipeline
from bench.models.folder import family_of, header
from bench.models.hub_pipeline import CONFIGURATIONS
from bench.models.stable_diffusion import StableDiffusion
from bench.runtime.files import naming_disk_errors

DENOISER = "model.diffusion_model."  # how the names of its tensors begin in such a file
V_PREDICTION = "v_pred"  # a tensor that says so, in some


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
    if not (denoiser := sum(name.startswith(DENOISER) for name in stored)):
        raise BenchError(f"{file} holds no {DENOISER}…: it is no whole checkpoint of Stable Diffusion.")
    configs = _configs(like)
    family = family_of(configs)
    if not issubclass(family, StableDiffusion):
        raise BenchError(
            f"--like {like} is a {family.pipeline_class.__name__}; files of Stable Diffusion alone are converted."
        )
    spec = check_pipeline(configs, family, guidance=1, weights=False).spec
    if V_PREDICTION in stored and spec.output != "v_prediction":
        raise BenchError(
            f"{file} says that it predicts v, and {like!r} predicts {spec.output}: give --like a copy of its "
            "folder with prediction_type = v_prediction in scheduler/scheduler_config.json."
        )
    precisions = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point() and tensor.dim()}
    try:
        pipe = family.pipeline_class.from_single_file(
            str(file),
            config=str(configs),
            local_files_only=True,
            dtype=precisions.pop() if len(precisions) == 1 else torch.float32,
            **family.unused,
        )
    except Exception as error:  # whatever a library raises over files of the user's
        reason = f"{type(error).__name__}: {str(error).split('. ')[0].strip(' .')}"
        if isinstance(error, NotImplementedError):  # moving networks to memory that have tensors without values
            reason = "tensors of its denoiser or autoencoder are missing"
        raise BenchError(f"{file} is no pipeline like {like!r}: {reason}.") from error
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:  # the library leaves them without values
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise BenchError(f"{file} lacks {', '.join(absent[:3])}{more}, which a pipeline like {like!r} has.")
    if (count := len(parts[family.denoiser].state_dict())) != denoiser:
        raise BenchError(f"{file} holds {denoiser} tensors of a denoiser, and the one of {like!r} has {count}.")
    with naming_disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
            whole = Path(place) / out.name
            pipe.save_pretrained(whole)
            check_pipeline(whole, family, guidance=1)
            shutil.move(whole, out)
    return spec.output


def _configs(like: str) -> Path:
    """The folder with the configurations and tokenizers of a pipeline; of the hub's, no weights are fetched."""
    repository = catalogue.repository(like)
    if repository is None:
        folder = catalogue.locate(like)
        if folder is None:
            raise BenchError(f"--like {like}: it is no pipeline; give sd15, sd21, sdxl, a folder or a hub id.")
        return folder
    return Repository(repository.name, ("model_index.json",), also=CONFIGURATIONS[1:]).path()
