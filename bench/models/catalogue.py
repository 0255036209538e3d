"""Models by name, local folder or hub id.

A name has a card (`bench.models.cards`) or is a plugin that is code alone; any other pipeline is read by the family of
its class, which is a plugin too (see `bench.registry`). Names are read without torch, which is imported where a model
is made.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import registry
from bench.errors import BenchError, did_you_mean
from bench.few_step import FewStep
from bench.hub import Repository
from bench.models.card import EmbeddedCard, HubCard
from bench.models.cards import CARDS
from bench.models.folder import family_of
from bench.models.hub_pipeline import CONFIGURATIONS, HubPipeline
from bench.settings import ModelConfig, SamplerConfig

if TYPE_CHECKING:
    import torch

    from bench.model import DiffusionModel, ModelSpec
    from bench.models.family import Blueprint
    from bench.sampling.kernel import Kernel


IMAGES = "images"  # no model: finished images are judged


def names() -> list[str]:
    """All models that have a name."""
    return [*CARDS, *registry.plugins("models")]


def is_analytic(name: str) -> bool:
    """Whether a model is a class of its own, and no pipeline."""
    return name in registry.plugins("models")


def draws_points(name: str) -> bool:
    """Whether a model's samples are points and not images."""
    return is_analytic(name) and registry.load("models", name).points


def few_step(name: str) -> FewStep | None:
    """What a model was distilled to, if it is known as a few-step student."""
    if is_analytic(name):
        return registry.load("models", name).few_step
    card = CARDS.get(name)
    return card.few_step if card else None


def ships(name: str) -> bool:
    """Whether a model is part of this package, with its weights, or there is none."""
    return name == IMAGES or is_analytic(name) or isinstance(CARDS.get(name), EmbeddedCard)


def repository(name: str, t5: bool = True) -> Repository | None:
    """The hub repository that a model's weights come from; None for one that ships or lies in a local folder.

    t5: with the parts that `model.t5=false` leaves out.
    Raises BenchError for an unknown name or a folder that holds no pipeline. Nothing is loaded or downloaded here.
    """
    if ships(name):
        return None
    if isinstance(card := CARDS.get(name), HubCard):
        return card.repository(t5)
    if (folder := Path(name)).is_file():
        raise BenchError(
            f"the model {name!r} is a single file: `bench convert {name} --like sd15` (or sdxl, …) makes the folder of "
            "it that a run takes."
        )
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise BenchError(f"the folder {name!r} is no diffusers pipeline: it has no model_index.json.")
        return None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        hint = did_you_mean(name, names())
        raise BenchError(f"unknown model {name!r}{hint} Or give a local folder or a hub id (org/name).")
    return HubPipeline(name, ("model_index.json",), also=CONFIGURATIONS, t5=t5)


def is_here(name: str, t5: bool = True) -> bool:
    """Whether nothing of the model has to be fetched; see `repository`."""
    source = repository(name, t5)
    return source is None or not source.missing()


def locate(name: str, t5: bool = True) -> Path | None:
    """The folder of a model's weights, which may be the local cache of a hub repository; None for an analytic model.

    A hub id that is not cached is downloaded if the hub can be reached. Raises BenchError, within seconds, for an
    unknown name or for weights that are missing while offline. Nothing is loaded here.
    """
    if is_analytic(name) or name == IMAGES:
        return None
    if isinstance(card := CARDS.get(name), EmbeddedCard):
        return card.folder
    source = repository(name, t5)
    return source.path() if source else Path(name)


def pipeline_folder(name: str, t5: bool = True) -> Path:
    """See `locate`; of a model that has weights."""
    _require_model(name)
    folder = locate(name, t5)
    assert folder, f"{name} is code alone"
    return folder


def _require_model(name: str) -> None:
    if name == IMAGES:
        raise BenchError("finished images were judged, and no model: there is nothing to draw with. Judge them anew.")


def model_class(name: str, t5: bool = True) -> "type[DiffusionModel] | None":
    """The class that reads a model; None for a hub id whose `model_index.json` is not here. See `repository`."""
    if is_analytic(name):
        return registry.load("models", name)
    if is_here(name, t5):
        return family_of(pipeline_folder(name, t5))
    card = CARDS.get(name)
    return registry.load("pipelines", card.architecture.pipeline) if isinstance(card, HubCard) else None


def check(config: ModelConfig, samplers: Iterable[SamplerConfig]) -> "list[tuple[DiffusionModel | Blueprint, Kernel]]":
    """The model without its weights, and each sampler's kernel; nothing if its files are not here yet.

    Raises BenchError for files that cannot be represented, or a setting that does not fit.
    """
    samplers = list(samplers)
    if student := few_step(config.name):
        for sampler in samplers:
            student.require(config.name, sampler)
    if not is_here(config.name, config.t5):
        return []
    if is_analytic(config.name):
        _require_own_size(config)
    checked = []
    for sampler in samplers:
        kind = model_class(config.name, config.t5)
        if config.negative_prompt and kind and kind.rows(2) == 1:
            raise BenchError(f"model.negative_prompt: no guidance of {config.name!r} could lead away from it.")
        model = load_model(config, sampler) if is_analytic(config.name) else _blueprint(config, sampler.guidance)
        checked.append((model, make_kernel(model.spec, sampler)))
    return checked


def _require_own_size(config: ModelConfig) -> None:
    what = "draws points" if draws_points(config.name) else "is no pipeline"
    for name, chosen in (("size", config.size), ("frames", config.frames > 1)):
        if chosen:
            raise BenchError(f"model.{name}: {config.name!r} {what}; leave it out.")


def _blueprint(config: ModelConfig, guidance: float) -> "Blueprint":
    """The checked pipeline with its adapter; made once a process for files that stay as they are."""
    folder = pipeline_folder(config.name, config.t5)
    states = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    files = tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states)
    return _checked(config.model_dump_json(), guidance, folder, files)


@lru_cache(maxsize=4)
def _checked(config: str, guidance: float, folder: Path, files: tuple[Any, ...]) -> "Blueprint":
    from bench.models.checks import check_pipeline
    from bench.models.lora import add_lora

    model, family = ModelConfig.model_validate_json(config), family_of(folder)
    only = {"scheduler", family.denoiser} if ships(model.name) else None  # the rest may ship elsewhere
    blueprint = check_pipeline(folder, family, guidance, only=only, config=model)
    if model.finetune == "lora":
        add_lora(blueprint.network, model.lora, family.lora_targets)
    return blueprint


def load_model(
    config: ModelConfig, sampler: SamplerConfig, *, device: "torch.device | str" = "cpu", seed: int = 0
) -> "DiffusionModel":
    """The configured model on `device`. seed: of its adapter's first values."""
    from bench.models.checks import quiet_libraries
    from bench.runtime import memory

    _require_model(config.name)
    folder = locate(config.name, config.t5)
    kind: type[DiffusionModel] = family_of(folder) if folder else registry.load("models", config.name)
    quiet_libraries()
    if folder and not ships(config.name):
        _blueprint(config, sampler.guidance)
    try:
        with memory.phase():
            return kind.create(folder, config, guidance=sampler.guidance, device=device, seed=seed)
    except BenchError:
        raise
    except Exception as error:  # whatever a library raises over files of the user's
        raise BenchError(f"the model {config.name!r} does not load: {type(error).__name__}: {error}.") from error


def load_teacher(name: str, *, device: "torch.device | str" = "cpu") -> "tuple[DiffusionModel, Kernel]":
    """The model that the few-step student of this name was distilled from, and the kernel of its noise levels."""
    student = few_step(name)
    assert student and student.teacher, f"{name} has no teacher here"
    teacher, sampler = student.teacher
    model = load_model(ModelConfig(name=teacher, finetune="none"), sampler, device=device)
    return model, make_kernel(model.spec, sampler)


def make_kernel(spec: "ModelSpec", sampler: SamplerConfig) -> "Kernel":
    """The configured transition kernel over the model's noise schedule. Raises BenchError for what does not fit it."""
    from bench.sampling.grids import ddim_kernel, flow_kernel

    spacing = spec.spacing if sampler.spacing == "auto" else sampler.spacing
    common: dict[str, Any] = {"eta": sampler.eta, "rule": sampler.rule, "spacing": spacing}
    is_flow = spec.output == "flow"
    if unfit := sampler.final_alpha if is_flow else sampler.final_noise:
        name, right = ("final_alpha", "final_noise") if is_flow else ("final_noise", "final_alpha")
        kind = "flow-matching" if is_flow else "diffusion"
        raise BenchError(f"sampler.{name} = {unfit:g} means nothing to a {kind} model: use sampler.{right}.")
    if is_flow:
        common |= {"shift": spec.shift, "tokens": spec.tokens, "final_noise": sampler.final_noise}
        return flow_kernel(sampler.steps, **common)
    assert spec.alphas_cumprod is not None, "a diffusion has a schedule"
    return ddim_kernel(
        spec.alphas_cumprod,
        sampler.steps,
        **common,
        output=spec.output,
        steps_offset=spec.steps_offset,
        final_alpha=spec.final_alpha if sampler.final_alpha is None else sampler.final_alpha,
    )
