"""What a run's adapter carries: a model card with lines of plain diffusers that redraw an image of the run; the hub."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bench import registry
from bench.core import Core
from bench.errors import BenchError
from bench.hub import obtain, reachable
from bench.method import Method
from bench.models import catalogue
from bench.models.card import EmbeddedCard
from bench.models.cards import CARDS
from bench.models.elsewhere.weights import load_adapter
from bench.models.export import export_layouts
from bench.models.pipeline import PipelineModel
from bench.models.precision import network_dtype
from bench.reporting.table import markdown_text, run_markdown
from bench.runs.requirements import training_requirements
from bench.runtime import processes
from bench.sampling.noise import key
from bench.settings import RunConfig

NETWORKS = "networks.safetensors"  # in an adapter's folder, of a method whose networks steer the sampler


def trained(folder: Path) -> tuple[RunConfig, Path]:
    """The configuration and the weights of a run's folder, or of an adapter alone. Raises BenchError for neither."""
    from bench.config import read

    if not (folder / "config.yaml").is_file():
        raise BenchError(f"{folder} is no run and no adapter of one: it has no config.yaml.")
    config = read(folder / "config.yaml")
    if not registry.load("methods", config.method.name).needs.training:
        raise BenchError(f"{folder} holds a run of {config.method.name!r}, which trains nothing: it has no adapter.")
    if not registry.load("methods", config.method.name).needs.adapters:
        raise BenchError(
            f"{folder} holds a run of {config.method.name!r}, which steers the prior with a network of its own and "
            "trains no adapter: bench eval draws with it, and diffusers has no use for it."
        )
    if catalogue.is_analytic(config.model.name):
        raise BenchError(
            f"{config.model.name!r} draws points, no images: samples.png and points.npz of the run hold them, and "
            "diffusers has no use for its adapter."
        )
    adapter = folder if (folder / "README.md").is_file() else folder / config.adapter_name()
    if not (adapter / "README.md").is_file():
        raise BenchError(f"{folder} has no adapter with a model card: finish the run with the command that began it.")
    return config, adapter


def save_networks(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the method's own networks, without which it cannot sample, beside the adapter in `folder`."""
    weights = {f"{name}.{key}": p for name, network in networks.items() for key, p in network.state_dict().items()}
    save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / NETWORKS)


def load_networks(method: Method, core: Core, folder: Path) -> None:
    """Make the method's networks part of the core, with what `save_networks` wrote.

    Raises BenchError for a file that is missing, damaged or of other networks.
    """
    try:
        weights = load_file(folder / NETWORKS)
        for name, network in method.networks(core.model).items():
            own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
            network.load_state_dict(own)
            core.networks[name] = network.to(core.model.device)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BenchError(
            f"{folder / NETWORKS} is missing, damaged or of another version ({error}): run the command that made it "
            "again, with another --out."
        ) from error


def finish_adapter(run: Path, config: RunConfig, model: PipelineModel, rows: list[dict[str, Any]], prompt: str) -> None:
    """Add to the run's adapter its configuration, picture and model card.

    rows: of the final evaluation. prompt: the one whose first image the card redraws.
    """
    folder = run / config.adapter_name()
    for name in ("config.yaml", "samples.png"):
        shutil.copy(run / name, folder / name)
    base, card = catalogue.repository(config.model.name), CARDS.get(config.model.name)
    data = ModelCardData(
        base_model=base.name if base else None,
        license_name=card.licence if card else None,
        license="other" if card else "unknown",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "nabla-bench", config.method.name],
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{_text(config, model, rows, prompt)}", "utf8")


def _text(config: RunConfig, model: PipelineModel, rows: list[dict[str, Any]], prompt: str) -> str:
    sampler, seed = config.evaluation_sampler(), config.evaluation.seed
    base, card = catalogue.repository(config.model.name), CARDS.get(config.model.name)
    licence = card.licence if card else "that of the base model, which is not known here"
    facts = {
        "base": f"{_code(base.name if base else config.model.name)} ({model.pipeline_class.__name__})",
        "licence of the base": licence,
        "method": f"{_code(config.method.name)}, {rows[0]['updates']} updates, seed {config.seed}",
        "reward": f"{_code(config.reward.name)}, β = {config.reward.beta:g}",
        "sampler": f"{sampler.steps} steps of `{sampler.rule}`, η = {sampler.eta:g}, grid `{_spacing(config, model)}`",
        "guidance": f"{sampler.guidance:g} in sampling, {config.sampler.guidance:g} in training, "
        f"{config.loss_guidance():g} in its losses",
        "prompts": _code(config.prompts.name),
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in facts.items())
    note = "These lines redraw the run's first image, `000-…-0-finetuned`, to rounding in the network's precision:"
    if not _exact(config, model):
        note = (
            "The run's own images come from a sampler that diffusers does not have; these lines draw with diffusers' "
            "own, from the same first noise:"
        )
    elif config.model.quantize:
        note = (
            f"The run's own images come from weights in {config.model.quantize}; these lines draw with the weights in "
            "full, from the same noise:"
        )
    lines = redraw(config, model, prompt, config.seed if seed is None else seed)
    title = markdown_text(f"{config.method.name} on {config.reward.name}")
    return (
        f"# {title}\n\nFinetuned by nabla-bench; `config.yaml` holds all settings."
        f"\n\n| | |\n| --- | --- |\n{table}\n\n![Prior and finetuned, same prompts and noise](samples.png)\n\n"
        f"{note}\n\n```python\n{lines}```\n\n## Measured\n\n{run_markdown(rows)}\n"
    )


def _code(text: str) -> str:
    """A text as code in a cell of a Markdown table."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", r"\|").replace("\n", " ")


def _spacing(config: RunConfig, model: PipelineModel) -> str:
    spacing = config.evaluation_sampler().spacing
    return model.spec.spacing if spacing == "auto" else spacing


def _exact(config: RunConfig, model: PipelineModel) -> bool:
    """Whether diffusers' DDIM, fed our noise, takes the steps of the run's evaluation."""
    sampler = config.evaluation_sampler()
    ddim = model.output != "flow" and sampler.rule == "ddim" and sampler.final_alpha is None
    return ddim and _spacing(config, model) in ("leading", "trailing")


def redraw(config: RunConfig, model: PipelineModel, prompt: str, seed: int) -> str:
    """Python that draws the first sample of a prompt with plain diffusers, run in the folder of the adapter."""
    sampler, kind, name = config.evaluation_sampler(), model.pipeline_class.__name__, config.model.name
    base, options, imports = (
        json.dumps(str(catalogue.locate(name)), ensure_ascii=False),
        "",
        ["import numpy as np", "import torch"],
    )
    if repository := catalogue.repository(name):
        base = f'"{repository.name}"'
    elif isinstance(CARDS.get(name), EmbeddedCard):
        base, options = f'CARDS["{name}"].folder', f', **CARDS["{name}"].components()'
        imports.append("from bench.models.cards import CARDS")
    weights = 'pipe.load_lora_weights(".")'
    if config.model.finetune == "full":
        part = f"pipe.{model.denoiser}"
        weights = f'{part} = type({part}).from_pretrained("{model.denoiser}")'
    lines = [
        f"pipe = {kind}.from_pretrained({base}, dtype={model.precision}{options})",  # else each library chooses
        weights,
        f"bits = lambda k: np.random.Philox(key=0x{key(seed, 'evaluate', prompt, 0):032x}, counter=[0, 0, 0, k])",
        f"draw = lambda k: np.random.Generator(bits(k)).standard_normal({(1, *model.latent_shape)}, np.float32)",
        "noise = lambda k: torch.from_numpy(draw(k))",
    ]
    if _exact(config, model):
        kind = f"DDIMScheduler, {kind}"
        grid = f'timestep_spacing="{_spacing(config, model)}", clip_sample=False'
        lines += [
            f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {grid})",
            f"step, draws = pipe.scheduler.step, map(noise, range(1, {sampler.steps + 1}))",
            f"pipe.scheduler.step = lambda *a, **o: step(*a, eta={sampler.eta:g}, variance_noise=next(draws), **o)",
        ]
    start = "noise(0)"
    if hasattr(model.pipeline, "_pack_latents"):  # FLUX and Qwen-Image take them as tokens
        start = f"pipe._pack_latents(noise(0), 1, {', '.join(map(str, model.latent_shape))})"
    given = dict(model.call_guidance(sampler.guidance))
    if model.default_size or model.call_options:  # the call's own size may be another
        given |= dict(zip(("height", "width"), model.picture_size(), strict=True)) | dict(model.call_options)
    if config.model.negative_prompt or "true_cfg_scale" in given:  # which does nothing without one
        given["negative_prompt"] = config.model.negative_prompt
    arguments = ", ".join(
        f"{name}={value:g}" if type(value) is float else f"{name}={value!r}" for name, value in given.items()
    )
    call = f"pipe({prompt!r}, num_inference_steps={sampler.steps}, {arguments}, latents={start}"
    if model.video:
        lines += [f'frames = {call}, output_type="pil").frames[0]',
                  'frames[0].save("redrawn.webp", save_all=True, append_images=frames[1:], duration=62)']  # fmt: skip
    else:
        lines.append(f'{call}).images[0].save("redrawn.png")')
    return "\n".join([*imports, f"from diffusers import {kind}", "", *lines]) + "\n"


def export(folder: Path, out: Path | None) -> tuple[Path, list[str]]:
    """Write a run's adapter, as it is and in other layouts, the merged pipeline and the model card into a folder.

    out: None means `export` inside `folder`. Returns the folder and the layouts beside diffusers' own. Raises
    BenchError for a folder that has no adapter of images, or an `out` that holds files.
    """
    config, adapter = trained(folder)
    out = out or folder / "export"
    if out.is_dir() and any(out.iterdir()):
        raise BenchError(f"{out} holds files: give another folder with --out.")
    obtain(training_requirements(config))
    dtype = str(network_dtype(config.model, processes.state().device)).removeprefix("torch.")
    # a run's precision on this machine, though loaded on its CPU; of quantised weights, those in full
    settings = config.model.model_copy(update={"dtype": dtype, "quantize": None})
    model = catalogue.load_model(settings, config.sampler, seed=config.seed)
    assert isinstance(model, PipelineModel)
    load_adapter(model, adapter)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "samples.png"):
        shutil.copy(adapter / name, out / name)
    model.save(out)
    lines = export_layouts(model, out)
    table = "\n".join(f"| `{layout}/` | {_code(line)} |" for layout, line in lines.items())
    text = f"## Other layouts\n\n| folder | instead of the line that loads the adapter |\n| --- | --- |\n{table}\n"
    card = (adapter / "README.md").read_text("utf8")
    (out / "README.md").write_text(card.replace("## Measured\n", f"{text}\n## Measured\n", 1), "utf8")
    return out, list(lines)


def push(folder: Path, name: str, public: bool) -> str:
    """Upload a run's adapter to the hub repository `org/name`, made if need be; returns its address.

    Raises BenchError where the hub cannot be reached or refuses.
    """
    _, adapter = trained(folder)
    if name.count("/") != 1:
        raise BenchError(f"{name!r} is no hub id: give organisation/name, for example me/sd15-hps-nabla.")
    if not reachable():
        raise BenchError(
            f"the hub cannot be reached, so {adapter} was not uploaded; where there is a network, repeat this."
        )
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(name, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=adapter, commit_message="Adapter from nabla-bench")
    except Exception as error:  # no token, no right, no space: the hub's sentence says it best
        raise BenchError(f"uploading {adapter} to {name!r} failed: {error} (hf auth login gives access)") from error
    return str(address)
