"""How long a run will take on this machine, from small pieces of it that are computed and thrown away.

A run that goes on says it from its own updates: see `Pace.of`.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import registry
from bench.errors import BenchError
from bench.evaluation.draw import draw, sample_names
from bench.evaluation.scores import score_samples
from bench.models.catalogue import model_class
from bench.prompts import load_prompts
from bench.runs.build import build_core, build_method, evaluation_core, use_threads
from bench.runs.requirements import requirements
from bench.settings import OptimizerConfig, RunConfig, SamplerConfig
from bench.training.trainer import Trainer

ENOUGH = 0.5  # seconds of a piece below which it is not trusted
PROPORTIONAL = 1.6  # times as long as its half a piece must take for time to be taken as proportional to its size
LONG = 10.0  # a first piece that takes so long is not repeated, although it loads and compiles too
LARGE = 2**30  # bytes of weights with which a CPU is not tried
PIECE = 4  # evaluation samples of the first piece
TRAINING = ("rollout", "reward", "losses", "backward", "optimizer")  # phases of an update


@dataclass(frozen=True)
class Pace:
    """Seconds of an update, with its share of a round's sampling, and of drawing and scoring an evaluation sample."""

    update: float
    sample: float

    @classmethod
    def of(cls, config: RunConfig, record: Mapping[str, Any]) -> "Pace":
        """From the log record of a run's latest update: one NFE takes as long in evaluation as in training."""
        seconds = sum(record.get(f"seconds/{phase}", 0.0) for phase in TRAINING)
        rows = record["network_forwards"] + record["network_backwards"]
        sampled = 2 * prediction_rows(config, config.evaluation_sampler())  # the policy's, and the prior's beside it
        return cls(seconds / record["update"], seconds / rows * sampled)

    @classmethod
    def measured(cls, config: RunConfig) -> "Pace":
        """From pieces computed now, in this process; nothing is kept. What the configuration needs must be here."""
        use_threads(config)
        core, method = build_core(config), build_method(config)
        prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
        names, splits = sample_names(prompts, config.evaluation)
        evaluated = evaluation_core(core, config)

        def samples(count: int) -> None:
            drawn = draw(evaluated, names[:count], splits[:count], seed=config.seed, method=method)
            score_samples(drawn, {config.reward.name: core.reward_model}, core.micro_batch)

        def round_of(count: int) -> None:
            train = config.train.model_copy(update={"prompts_per_round": count, "updates_per_round": 1})
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(core, build_method(config), prompts.train, train, config.optimizer, Path(folder))
                trainer.train_on(trainer.sample_round(0))

        update = 0.0
        if method.needs.training:  # first: a method's own networks, which it may sample with, are made for training
            prompt = seconds_of_one(round_of, 1, config.train.prompts_per_round)
            update = prompt * config.train.prompts_per_round / config.train.updates_per_round
        return cls(update, seconds_of_one(samples, PIECE, len(names)))


def prediction_rows(config: RunConfig, sampler: SamplerConfig) -> int:
    """NFE of one sample: steps, times the rows of a guided prediction."""
    model = model_class(config.model.name, config.model.t5)
    return sampler.steps * (model.rows(sampler.guidance) if model else 2)  # the class is not known before it is here


def seconds_left(config: RunConfig, pace: Pace, samples: int, done: int = 0) -> tuple[float, float]:
    """Seconds of training and of evaluation that a run needs after `done` updates.

    samples: of an evaluation. The prior's three sets, drawn before the first one unless the cache has them, take half
    of an evaluation each. Loading, metrics and pictures come on top.
    """
    at = (
        config.evaluated_at() if registry.load("methods", config.method.name).needs.training else [config.train.updates]
    )
    evaluations = sum(update > done for update in at) + 1.5 * (done < at[0])
    return (config.train.updates - done) * pace.update, evaluations * samples * pace.sample


def time_text(training: float, evaluation: float) -> str:
    """ "about 3 min (training 2 min, evaluation 40 s)" of so many seconds each."""
    return f"about {_clock(training + evaluation)} (training {_clock(training)}, evaluation {_clock(evaluation)})"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def measured_time(config: RunConfig, memory: Mapping[str, int] | None) -> str:
    """What a plan says of the time of a run in one process; memory: its estimate by purpose."""
    if any(need.missing() for need in requirements(config)):
        return "unknown before everything is here"
    if memory and memory["weights"] > LARGE and not torch.cuda.is_available():
        return "not tried: a model of this size takes minutes on a CPU for the smallest piece of a run"
    return time_text(*seconds_left(config, Pace.measured(config), evaluation_samples(config)))


def evaluation_samples(config: RunConfig) -> int:
    """Samples in each set of an evaluation."""
    prompts = load_prompts(config.prompts.name, config.prompts.limit, config.prompts.split)
    return len(sample_names(prompts, config.evaluation)[0])


def sweep_time(configs: Sequence[RunConfig], at_once: int, threads: int = 1) -> str:
    """What a sweep says of the time of its runs, of so many threads each.

    Each kind of run is tried once, whatever its seed, learning rates and β.
    """
    paces: dict[str, Pace] = {}
    total = 0.0
    for config in configs:
        reward = config.reward.model_copy(update={"beta": 1.0})
        kind = config.model_copy(update={"seed": 0, "optimizer": OptimizerConfig(), "reward": reward}).hash()
        if kind not in paces:
            try:
                paces[kind] = Pace.measured(config)
            except BenchError:  # the run itself will say what is wrong
                paces[kind] = Pace(0.0, 0.0)
        total += sum(seconds_left(config, paces[kind], evaluation_samples(config)))
    at_once = min(at_once, len(configs))
    parallel = f", {_clock(total / at_once)} with {at_once} at once" * (at_once > 1)
    return f"about {_clock(total)} of runs{parallel}; {total / 3600 * threads:.2g} thread-hours"


def seconds_of_one(work: Callable[[int], None], first: int, most: int) -> float:
    """Seconds of one of many units of work, from pieces twice as large each time.

    Of the first piece that takes `ENOUGH`, and so much longer than its half that what is the same for pieces of every
    size, which decides in a small model, no longer counts.
    """
    if (seconds := _seconds(work, first)) > LONG:
        return seconds / first
    units, half = first, 0.0
    while True:
        seconds = _seconds(work, units)
        grown = seconds > ENOUGH and seconds > PROPORTIONAL * half > 0
        if grown or seconds > LONG or units >= most:
            return seconds / units
        units, half = min(most, 2 * units), seconds


def _seconds(work: Callable[[int], None], units: int) -> float:
    start = time.perf_counter()
    work(units)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
