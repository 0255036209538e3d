"""Finished images, judged without a model: every metric that needs none, beside images of the prior."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from rich.console import Console

from bench import config as configs
from bench import registry
from bench.errors import BenchError, disk_error
from bench.evaluation.draw import sample_names
from bench.evaluation.evaluator import measure
from bench.evaluation.features import Features
from bench.evaluation.image_folder import EACH, save_images
from bench.evaluation.pictures import draw_images
from bench.evaluation.scores import load_reward, score_samples
from bench.hub import obtain, project_cache
from bench.metric import Evaluation, Measurement, Samples
from bench.models.catalogue import IMAGES
from bench.prompts import PromptSet, listed, load_prompts
from bench.reporting.rows import FINGERPRINT, read_rows, write_rows
from bench.reporting.table import run_table
from bench.runs.folder import take_folder
from bench.runs.requirements import requirements
from bench.runs.rows import default_folder, label, provenance, row
from bench.runtime import processes
from bench.runtime.digests import digest_contents
from bench.runtime.meter import Meter
from bench.settings import JUDGED, RunConfig

ROWS = 16  # images that are scored and embedded at once
NUMBERS = {"number": r"\d+", "sample": r"\d+", "prompt": ".+"}
Files = dict[tuple[str, int], Path]  # (prompt, number of the sample) → file


def index_of(folder: Path, pattern: str | None, prompts: Sequence[str], which: str) -> Files:
    """The images of a folder.

    pattern: of the names below it, with {sample}, and {prompt} or {number}, the prompt's place in `prompts` from 0;
    None: `index.csv` says it, with the columns prompt, sample and file, or, as `bench sample` writes it, `which`.
    Raises BenchError for a folder that has neither, or a file that is not there.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder} is no folder of images.")
    files = _by_pattern(folder, pattern, prompts) if pattern else _by_index(folder / "index.csv", which)
    if absent := [path for path in files.values() if not path.is_file()]:
        raise BenchError(f"{absent[0]} is missing: {folder} names {len(absent)} images that are not there.")
    return files


def _by_index(path: Path, which: str) -> Files:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise BenchError(
            f"{path} is missing: it has the columns prompt, sample and file; or give --pattern "
            "'{number}-{sample}.png', the prompt's place in --prompts and the sample's number."
        ) from None
    except (OSError, ValueError) as error:
        raise BenchError(
            disk_error(error, path) if isinstance(error, OSError) else f"cannot read {path}: {error}."
        ) from None
    column = "file" if "file" in table else which
    if lacking := [name for name in ("prompt", "sample", column) if name not in table]:
        raise BenchError(f"{path} has no column {', '.join(lacking)}: it needs prompt, sample and file.")
    if not table["sample"].str.fullmatch(r"\d+").all():
        raise BenchError(f"{path}: sample is the number of an image of its prompt, 0, 1, ….")
    keys = zip(table["prompt"].str.strip(), table["sample"].astype(int), strict=True)
    return _distinct(path, [(key, path.parent / name) for key, name in zip(keys, table[column], strict=True)])


def _by_pattern(folder: Path, pattern: str, prompts: Sequence[str]) -> Files:
    fields = re.findall(r"\{(\w*)\}", pattern)
    if sorted(fields) not in (["number", "sample"], ["prompt", "sample"]):
        raise BenchError(f"--pattern {pattern}: it holds {{sample}}, and {{number}} or {{prompt}}, each once.")
    words = re.split(r"\{(\w+)\}", pattern)
    expression = "".join(
        f"(?P<{word}>{NUMBERS[word]})" if place % 2 else re.escape(word) for place, word in enumerate(words)
    )
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if match := re.fullmatch(expression, path.relative_to(folder).as_posix()):
            named = match.groupdict()
            if "number" in named and int(named["number"]) >= len(prompts):
                raise BenchError(f"{path}: --prompts has {len(prompts)} prompts, from 0, and none of that number.")
            prompt = prompts[int(named["number"])] if "number" in named else named["prompt"]
            found.append(((prompt, int(named["sample"])), path))
    if not found:
        raise BenchError(f"no file below {folder} is called like --pattern {pattern}.")
    return _distinct(folder, found)


def _distinct(where: Path, found: Sequence[tuple[tuple[str, int], Path]]) -> Files:
    files = dict(found)
    if len(files) < len(found):
        twice = next(key for place, (key, _) in enumerate(found) if key in [other for other, _ in found[:place]])
        raise BenchError(f"{where} names sample {twice[1]} of {twice[0]!r} twice.")
    return files


def configured(
    folder: Path, files: Files, *, prompts: str, name: str | None, cost: Mapping[str, int | float], **rest: Any
) -> RunConfig:
    """The configuration that judges a folder's images of all these prompts.

    name: what tables call it. cost: as its author states it. rest: see `bench.config.resolve`.
    """
    settings: dict[str, Any] = {
        "model.name": IMAGES,
        "model.finetune": "none",
        "prompts.name": prompts,
        "evaluation.samples_per_prompt": max(2, min(_counts(files).values())),
        "method.label": name or folder.resolve().name,
        "method.sources": [folder.resolve().name],
        "method.digest": _digest(files),
        **{f"method.cost.{key}": value for key, value in cost.items()},
    }
    known = load_prompts(prompts, rule=configs.resolve(JUDGED, overrides=settings, **rest).prompts.split)
    if unknown := sorted({prompt for prompt, _ in files} - {*known.all}):
        raise BenchError(f"{folder} has images of {unknown[0]!r}, which is no prompt of {prompts}.")
    settings |= {
        "evaluation.train_prompts": max(1, len(known.train)),
        "evaluation.validation_prompts": len(known.validation),
        "evaluation.test_prompts": len(known.test),
    }
    return configs.resolve(JUDGED, overrides=settings, **rest)


def judge_images(
    config: RunConfig, files: Files, prior: Files, out: Path | None, force: bool, console: Console
) -> Path:
    """Measure images beside the prior's, and write rows and pictures as a run does; returns the folder.

    Metrics that compare pairs use as many samples of a prompt as both have. Distances to the prior need three sets of
    it, and use a third of its images for each.
    """
    folder = out or default_folder(config)
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    _require_prompts(config, prompts, {"the images": files, "--prior": prior})
    obtain(requirements(config))
    with ExitStack() as locks:
        if take_folder(folder, config, console, force, locks):
            console.print("This is judged already; nothing was computed.")
        else:
            evaluation, measurements = _measured(config, prompts, files, prior, console)
            info = provenance(config) | {"prior": {FINGERPRINT: _digest(prior)[:12]}}
            rows = [row(config, prompts, Meter().total(), info, one, 0) for one in measurements]
            draw_images(evaluation, folder / "samples.png", f"{label(config)} on {config.reward.name}")
            sets = {"finetuned": evaluation.finetuned, "prior": evaluation.prior}
            save_images(folder / "images", sets, seed=None, each=EACH)
            write_rows(folder / "rows.parquet", rows)
        console.print(run_table(read_rows(folder / "rows.parquet")))
    return folder


def _require_prompts(config: RunConfig, prompts: PromptSet, folders: Mapping[str, Files]) -> None:
    names, _ = sample_names(prompts, config.evaluation)
    for name, files in folders.items():
        if absent := sorted({prompt for prompt, _ in names} - {prompt for prompt, _ in files}):
            raise BenchError(
                f"{name}: there is no image of {absent[0]!r} and {len(absent) - 1} more of {config.prompts.name}: give "
                "--prompts a file with the prompts alone that were drawn."
            )
        if (fewest := min(_counts(files).values())) < 2:
            raise BenchError(f"{name}: a prompt has {fewest} image, and metrics need two of every prompt.")


def _measured(
    config: RunConfig, prompts: PromptSet, files: Files, prior: Files, console: Console
) -> tuple[Evaluation, list[Measurement]]:
    device = processes.state().device
    options = config.reward.model_dump(exclude={"name", "beta"})
    trained = load_reward(config.reward.name, options, device)
    rewards = getattr(trained, "parts", {}) | {config.reward.name: trained}
    rewards |= {name: load_reward(name, device=device) for name in config.evaluation.rewards if name not in rewards}
    features = Features(project_cache(), config.evaluation.features, device, ROWS)
    n, of_prior = (min(_counts(one).values()) for one in (files, prior))

    def samples(which: Files, first: int, count: int) -> Samples:
        """Samples `first` to `first + count`, in order, of every prompt."""
        evaluated = config.evaluation.model_copy(update={"samples_per_prompt": count})
        names, splits = sample_names(prompts, evaluated)
        ordered: dict[str, list[Path]] = {}
        for (prompt, _), path in sorted(which.items()):
            ordered.setdefault(prompt, []).append(path)
        images = _images([ordered[prompt][first + number] for prompt, number in names])
        drawn = Samples(images=images, prompts=[prompt for prompt, _ in names], splits=splits, rewards={})
        return score_samples(drawn, rewards, ROWS, "the judged")

    def evaluation(count: int, starts: tuple[int, int, int]) -> Evaluation:
        """Of so many samples of a prompt; starts: the first ones of the prior's three sets."""
        sets = {start: samples(prior, start, count) for start in dict.fromkeys(starts)}
        paired, reference, floor = (sets[start] for start in starts)
        return Evaluation(
            finetuned=samples(files, 0, count),
            prior=paired,
            reference=reference,
            floor=floor,
            reward=config.reward.name,
            beta=config.reward.beta,
            features=features,
            feature_space=features.space,
        )

    with console.status("scoring images"):
        pairs, third = min(n, of_prior), min(n, of_prior // 3)
        paired = evaluation(pairs, (0, 0, 0))  # of the prior, metrics of pairs look at one set
        whole = evaluation(third, (0, third, 2 * third)) if third >= 2 else None
        console.print(
            f"{n} images of each prompt are judged beside {of_prior} of the prior: {pairs} of both where pairs are "
            f"compared, {third if whole else 0} in each of three sets of the prior for distances to it."
        )
        measurements = []
        for name in config.evaluation.metrics:
            if registry.load("metrics", name).pairs:
                measurements += measure(name, paired)
            elif whole:
                measurements += map(_without_path, measure(name, whole))
            else:
                note = "needs three times as many images of the prior as are compared, six of every prompt at least"
                measurements.append(Measurement(name, None, direction="none", note=note))
    return paired, measurements


def _without_path(measured: Measurement) -> Measurement:
    """Of a metric without a value, that images alone cannot have it."""
    needs_model = measured.value is None and "refused" not in measured.note and "failed" not in measured.note
    return replace(measured, note="needs the model, and images alone are judged") if needs_model else measured


def _images(paths: Sequence[Path]) -> torch.Tensor:
    """uint8 [N, 3, H, W]. Raises BenchError for what is no image, or has another size than the first."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        except (OSError, ValueError, SyntaxError) as error:
            raise BenchError(f"{path} cannot be read as an image: {error}.") from None
        if images[-1].shape != images[0].shape:
            (_, h, w), (_, first_h, first_w) = images[-1].shape, images[0].shape
            raise BenchError(f"{path} has {w} x {h} pixels, and {paths[0]} {first_w} x {first_h}: make them alike.")
    return torch.stack(images)


def _counts(files: Files) -> Mapping[str, int]:
    return Counter(prompt for prompt, _ in files)


def _digest(files: Files) -> str:
    return digest_contents({f"{prompt}/{number}": path for (prompt, number), path in sorted(files.items())})


def found(images: Path, prior: Path, pattern: str | None, prompts: str) -> tuple[Files, Files]:
    """The judged images and the prior's."""
    names = listed(prompts)
    return index_of(images, pattern, names, "finetuned"), index_of(prior, pattern, names, "prior")
