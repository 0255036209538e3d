"""The steps of `bench doctor --gpu`: each tries one thing on a device and compares it with the CPU."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, registry
from bench.config import resolve
from bench.core import Core
from bench.diagnose.profile import profile_prompts, sampling_rows, stand_ins, update_rows
from bench.diagnose.selftest.checking import Skipped, require
from bench.diagnose.selftest.models import nudge
from bench.evaluation.features import SPACES
from bench.evaluation.scores import load_reward
from bench.hub import Requirement
from bench.models.precision import use_precision
from bench.runs.build import build_core, build_method
from bench.runs.log import read_log
from bench.runs.requirements import training_requirements
from bench.runs.run import Run
from bench.runtime import processes
from bench.runtime.console import TextConsole
from bench.sampling.noise import generator
from bench.settings import ModelConfig, RunConfig
from bench.training.trainer import Record, Trainer

TOLERANCE = 1e-2  # relative, float32 on the device against float32 on the CPU
EXACT = ModelConfig(dtype="float32")  # what a run with such a denoiser computes with, whatever a step before this did
SUITE = "sd15-aesthetic"  # its prompts ship; its reward is learned and differentiable
FEW_STEPS = "emoji_flow_turbo"  # for methods that need a teacher
HALF = ("nabla_gfn", "ddpo", "draft_1", "adjoint_matching")  # methods also tried in bfloat16
TINY = {  # two updates' worth of trajectories, of which one update trains: the mean of a whole round's advantages is 0
    "reward.beta": 1000.0,
    "sampler.steps": 4,
    "train.updates": 1,
    "train.updates_per_round": 2,
    "train.prompts_per_round": 2,
    "train.samples_per_prompt": 3,
    "train.micro_batch": 2,
    "train.sample_batch": 4,
    "evaluation.train_prompts": 2,
    "evaluation.validation_prompts": 0,
    "evaluation.test_prompts": 1,
    "evaluation.samples_per_prompt": 2,
    "evaluation.features": "clip_vitl14",
    "evaluation.metrics": ["reward", "fid_prior", "path_kl"],
    "evaluation.rewards": ["jpeg_compressibility"],
}
SHORT = {  # at full size: enough to time, little enough for five minutes and 24 GB
    "sampler.steps": 10,
    "train.prompts_per_round": 2,
    "train.samples_per_prompt": 2,
    "train.updates_per_round": 1,
    "train.micro_batch": 2,
    "train.sample_batch": 4,
}
Found = tuple[str, dict[str, Any]]  # a note for the table, numbers for the report


def tiny(method: str, dtype: str = "float32", changes: Mapping[str, Any] | None = None) -> RunConfig:
    """A small setting of Stable Diffusion 1.5 in its scaled-down form, or of a few-step student."""
    kind = registry.load("methods", method)
    overrides = TINY | {"model.dtype": dtype} | dict(changes or {})
    small = {"channels": [32, 32], "fraction": 0.5}
    overrides |= {f"method.{name}": value for name, value in small.items() if name in kind.Config.model_fields}
    return resolve(method, suite=FEW_STEPS if kind.needs.teacher else SUITE, overrides=overrides)


def one_update(config: RunConfig, device: torch.device, folder: Path | None = None) -> Record:
    """The record of a run's last update on the device; of a method that trains nothing the size of its samples.

    folder: of checkpoints; what is there is gone on from.
    """
    core, method, prompts = build_core(config, device), build_method(config), profile_prompts(config)
    nudge(core.model)
    if not method.needs.training:
        with torch.no_grad():
            latents = method.sample(core, core.batch((prompt, 0) for prompt in prompts[:2])).latents[:, -1]
        return {"loss": float(latents.square().mean())}
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as temporary:
        trainer = Trainer(core, method, prompts, config.train, config.optimizer, folder or Path(temporary))
        trainer.resume()
        trainer.run(records.append)
    return records[-1]


def relative(ours: Tensor | float, theirs: Tensor | float) -> float:
    """The largest difference over the largest magnitude."""
    ours, theirs = (torch.as_tensor(value, dtype=torch.float64).cpu() for value in (ours, theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def steps(device: torch.device, full: bool, cache: Path, stack: ExitStack) -> dict[str, Callable[[], Found]]:
    """Name → what to do, cheap and likely failures first."""
    steps: dict[str, Callable[[], Found]] = {
        f"method {name}": partial(_method, name, device) for name in registry.plugins("methods")
    }
    steps |= {f"method {name} in bfloat16": partial(_half, name, device) for name in HALF}
    steps |= {f"reward {name}": partial(_reward, name, device) for name in registry.plugins("rewards")}
    steps |= {f"features {name}": partial(_features, name, device) for name in SPACES if name != "points"}
    steps["checkpoint"] = partial(_checkpoint, device)
    steps["whole run"] = partial(_whole_run, device, cache)
    steps["two processes"] = partial(_two_processes, device, cache)
    large = _FullSize(device, full, stack)
    return steps | {"speed of the sampler": large.sampler, "speed of an update": large.update}


def _method(name: str, device: torch.device) -> Found:
    ours, theirs = (one_update(tiny(name), place) for place in (device, torch.device("cpu")))
    _require_finite(ours)
    compared = [key for key in ours if key == "loss" or key.startswith("gradient_norm/")]
    errors = {key: relative(ours[key], theirs[key]) for key in compared}
    for key, error in errors.items():
        require(error <= TOLERANCE, f"{key} is {ours[key]:.6g}, on the CPU {theirs[key]:.6g}")
    note = f"loss {ours['loss']:.5g}, {errors['loss']:.0e} from the CPU's"
    return note, {"device": ours, "cpu": theirs, "relative": errors}


def _half(name: str, device: torch.device) -> Found:
    record = one_update(tiny(name, "bfloat16"), device)
    _require_finite(record)
    return f"loss {record['loss']:.5g}", {"device": record}


def _require_finite(record: Record) -> None:
    broken = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    require(not broken, f"not finite: {', '.join(broken)}")


def _reward(name: str, device: torch.device) -> Found:
    kind = registry.load("rewards", name)
    if kind.inputs != "images":
        raise Skipped("it scores points")
    _require_here(kind.files)
    results = []
    use_precision(EXACT, device)
    for place in (device, torch.device("cpu")):
        reward, images = load_reward(name, device=place), _images().to(place).requires_grad_(kind.differentiable)
        with torch.set_grad_enabled(kind.differentiable):
            scores = reward(images, ["cat", "dog"])
        gradient = torch.autograd.grad(scores.sum(), images)[0] if kind.differentiable else torch.ones(1)
        results.append((scores.detach(), gradient))
    errors = {part: relative(ours, theirs) for part, ours, theirs in zip(("score", "gradient"), *results, strict=True)}
    require(max(errors.values()) <= TOLERANCE, f"differs from the CPU's by {errors}")
    return f"{max(errors.values()):.0e} from the CPU's", {"relative": errors, "scores": results[0][0].tolist()}


def _features(name: str, device: torch.device) -> Found:
    _require_here(SPACES[name].files)
    use_precision(EXACT, device)
    ours, theirs = (SPACES[name](place)(_images()) for place in (device, "cpu"))
    error = relative(ours, theirs)
    require(error <= TOLERANCE, f"differs from the CPU's by {error:.1e}")
    return f"{error:.0e} from the CPU's", {"relative": error}


def _require_here(needs: Sequence[Requirement]) -> None:
    if absent := [need.source for need in needs if need.missing()]:
        raise Skipped(f"there are no weights, random ones neither: {', '.join(absent)}")


def _images() -> Tensor:
    return torch.from_numpy(generator(0, "weights", "doctor").random((2, 3, 64, 64), "float32"))


def _checkpoint(device: torch.device) -> Found:
    """Three updates, and two with one more after a restart."""
    config = tiny("nabla_gfn", changes={"train.updates": 3, "train.checkpoint_every": 1})
    part = config.model_copy(update={"train": config.train.model_copy(update={"updates": 2})})
    with tempfile.TemporaryDirectory() as folder:
        straight = one_update(config, device)
        one_update(part, device, Path(folder))
        resumed = one_update(config, device, Path(folder))
    require(resumed["update"] == straight["update"] == 3, "the run did not go on where it stopped")
    errors = {key: relative(resumed[key], straight[key]) for key in ("loss", "reward") if key in straight}
    require(max(errors.values()) <= TOLERANCE, f"the resumed run differs from a straight one by {errors}")
    return f"resumed, {errors['loss']:.0e} from a straight run", {"relative": errors}


def _whole_run(device: torch.device, cache: Path) -> Found:
    if processes.state().device != device:
        raise Skipped(f"a run would take {processes.state().device}")
    with tempfile.TemporaryDirectory() as folder, environment.variable("XDG_CACHE_HOME", str(cache)):
        log = _run(tiny("nabla_gfn", "auto", {"train.updates": 2}), Path(folder) / "run")
    return f"{len(log)} updates, evaluation, pictures", {"updates": log}


def _run(config: RunConfig, folder: Path) -> list[Record]:
    with ExitStack() as held:
        Run(config, folder, TextConsole(quiet=True)).go(False, held)
    require((folder / "rows.parquet").is_file(), "the run has no rows")
    return read_log(folder).to_dict("records")


def _two_processes(device: torch.device, cache: Path) -> Found:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skipped("one GPU" if device.type == "cuda" else "no GPU")
    return two_processes(cache)


def two_processes(cache: Path) -> Found:
    """A run by `--num-processes 2` against the same run here."""
    config = tiny("nabla_gfn", changes={"train.updates": 2})
    with tempfile.TemporaryDirectory() as folder, environment.variable("XDG_CACHE_HOME", str(cache)):
        one, two = Path(folder) / "one", Path(folder) / "two"
        ours = _run(config, one)
        settings = TINY | {"model.dtype": "float32", "train.updates": 2, "method.channels": [32, 32]}
        sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        sets.append(f"--set=method.fraction={config.method.model_dump()['fraction']}")
        command = [sys.executable, "-m", "bench", "run", "--method", "nabla_gfn", "--suite", SUITE, *sets]
        done = subprocess.run(
            [*command, "--out", str(two), "--num-processes", "2"],
            capture_output=True,
            encoding="utf8",
            errors="replace",
            timeout=600,
        )
        require(done.returncode == 0, f"status {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        theirs = read_log(two).to_dict("records")
    error = max(relative(b["loss"], a["loss"]) for a, b in zip(ours, theirs, strict=True))
    require(error <= TOLERANCE, f"the losses of two processes differ from those of one by {error:.1e}")
    return f"losses {error:.0e} from those of one", {"one": ours, "two": theirs}


class _FullSize:
    """Timings with Stable Diffusion 1.5's architecture in bfloat16, random weights; written and loaded once."""

    def __init__(self, device: torch.device, full: bool, stack: ExitStack):
        self.device, self.stack = device, stack
        suite, settings = ("sd15-hps", {}) if full else (SUITE, SHORT)
        self.config = resolve("nabla_gfn", suite=suite, overrides={"model.dtype": "bfloat16"} | settings)
        self.repeats = 3 if full else 2

    @cached_property
    def core(self) -> Core:
        """The core; its weights stay until the stack is closed."""
        if self.device.type != "cuda":
            raise Skipped("minutes a step without a GPU; bench profile --random-weights measures it all the same")
        self.stack.enter_context(stand_ins(training_requirements(self.config), "full", TextConsole(quiet=True)))
        return build_core(self.config, self.device)

    def sampler(self) -> Found:
        """`rollout` against diffusers' pipeline."""
        rows = sampling_rows(self.core, profile_prompts(self.config), self.repeats)
        ours, theirs = (min(row["seconds"] for row in measured) for measured in rows.values())
        count, steps = self.core.sample_batch, self.core.kernel.steps
        note = f"{ours / count:.3f} s a latent of {steps} steps, {ours / theirs:.3f} times diffusers' pipeline"
        return note, {"config": self.config.model_dump(mode="json"), "rows": rows}

    def update(self) -> Found:
        """An update by phase."""
        rows = update_rows(self.core, self.config, profile_prompts(self.config), 1)
        phases = {name.removeprefix("seconds/"): rows[-1][name] for name in rows[-1] if name.startswith("seconds/")}
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        note = f"{sum(phases.values()):.2f} s: {parts}; {rows[-1]['peak_memory'] / 2**30:.1f} GiB"
        return note, {"config": self.config.model_dump(mode="json"), "rows": rows}
