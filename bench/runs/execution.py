"""What a run computes: it trains, evaluates, and writes rows and pictures to its folder."""

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from bench.errors import NonFiniteError
from bench.evaluation.alarms import Alarms
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.image_folder import EACH, save_images
from bench.evaluation.pictures import draw_samples
from bench.hub import project_cache
from bench.method import Method
from bench.metric import Evaluation, Measurement
from bench.models.catalogue import draws_points
from bench.models.elsewhere.weights import install
from bench.models.pipeline import PipelineModel
from bench.prompts import PromptSet
from bench.reporting.frontier import FILE, Frontier
from bench.reporting.frontier import write as write_frontier
from bench.reporting.plots import plot_curves
from bench.reporting.rows import read_rows, write_rows
from bench.runs.adapter import finish_adapter, save_networks
from bench.runs.build import build_core, build_method, evaluation_core
from bench.runs.duration import Pace, seconds_left, time_text
from bench.runs.frontier import trace_core
from bench.runs.log import UpdateLog, read_log
from bench.runs.progress import evaluate, evaluating, training_progress
from bench.runs.rows import judged_weights, prior_settings, provenance, row
from bench.runs.trackers import open_trackers
from bench.runs.warn import warn_of_cut, warn_of_first_noise, warn_of_one_step, warn_of_stages
from bench.runtime import memory, processes
from bench.runtime.files import write_atomic
from bench.settings import JUDGED, RunConfig
from bench.training.trainer import Record, Trainer

SETTLED = 3.0  # seconds of training after which its pace is known
log = logging.getLogger(__name__)


def rows_at(update: int) -> str:
    """Name of the file with the rows of an evaluation between updates."""
    return f"rows-at-{update:07d}.parquet"


class Execution:
    """The objects of a run, and its steps in order: `train`, `evaluate`, `finish`."""

    def __init__(
        self, config: RunConfig, folder: Path, console: Console, prompts: PromptSet, trackers: Sequence[str] = ()
    ):
        self.config, self.folder, self.console, self.prompts = config, folder, console, prompts
        self.main, self.alarms = processes.is_main(), Alarms(config.reward.beta)
        self.info = provenance(config) | {"processes": processes.count()}
        if self.main:
            write_atomic(folder / "environment.json", json.dumps(self.info, indent=2).encode())
        method = build_method(config)
        self.trainer: Trainer | None = None
        with memory.phase("loading"):
            self.core = build_core(config)
            if config.method.name == JUDGED:
                install(self.core.model, folder / "adapter", config)
            core = evaluation_core(self.core, config)
            self.evaluator = Evaluator(core, config, prompts, project_cache(), method, weights=judged_weights(config))
            if method.needs.training:
                self.trainer = Trainer(self.core, method, prompts.train, config.train, config.optimizer, folder)
        self.info["prior"] = prior_settings(config, core.model)
        self.pipeline = getattr(self.core.model, "pipeline", None)
        if self.main:
            self._warn(method)
        if self.trainer and self.trainer.resume():
            console.print(f"Resuming after update {self.trainer.update} of {config.train.updates}.")
        self.log: UpdateLog | None = None
        if self.main and self.trainer:
            self.log = UpdateLog(folder, self.trainer.update, open_trackers(trackers, folder, config))

    def _warn(self, method: Method) -> None:
        """Print what the settings alone do not say."""
        if self.core.model.device.type == "cuda":
            sizes = f"train.micro_batch = {self.core.micro_batch}, train.sample_batch = {self.core.sample_batch}"
            self.console.print(sizes)
        if self.pipeline:
            warn_of_cut(self.prompts.all, self.pipeline.tokenizer)
        if self.config.model.shard and not self.core.model.sharded:
            self.console.print("model.shard = true changes nothing in one process: give --num-processes.")
        if method.needs.density:
            warn_of_one_step(self.core.kernel)
        if method.needs.memoryless:
            warn_of_first_noise(self.core.kernel)
        warn_of_stages(method, self.config.train.rounds)

    def run(self, stored: Callable[[], None] = lambda: None) -> None:
        """Train or resume, evaluate, and write the results to the folder.

        stored: called whenever a checkpoint or the rows of an evaluation between updates have been written.
        """
        try:
            with self.log or contextlib.nullcontext():
                if self.trainer:
                    self._train(self.trainer, stored)
                    if self.main:
                        self._save_adapter(self.trainer)
                evaluation, measurements = evaluate(self.evaluator, self.console)
                if self.log:
                    self.log.evaluated(self._updates, evaluation, measurements)
        except NonFiniteError as error:  # a failure is a result too
            failed = self._rows([Measurement("run", None, direction="none", note=str(error))])[0]
            if self.main:
                write_rows(self.folder / "rows.parquet", [failed | {"status": "failed"}])
            processes.state().wait_for_everyone()  # a launcher ends all processes when the first one fails
            raise
        rows = self._rows(self._ended(self.alarms.noted(measurements, evaluation.finetuned.step_kl)))
        frontier = self._frontier()
        if self.main:
            if frontier:
                write_frontier(self.folder / FILE, [frontier])
            self._pictures(evaluation, measurements, rows)
            if evaluation.finetuned.images.ndim == 4:
                sets = {"finetuned": evaluation.finetuned, "prior": evaluation.prior}
                save_images(self.folder / "images", sets, seed=self.evaluator.seed, each=EACH)
                adapted = self.trainer and self.trainer.method.needs.adapters
                if adapted and isinstance(self.core.model, PipelineModel):
                    finish_adapter(self.folder, self.config, self.core.model, rows, evaluation.finetuned.prompts[0])
            write_rows(self.folder / "rows.parquet", rows)  # written last: it marks the run as finished

    def _frontier(self) -> Frontier | None:
        """The least KL at every gain, where samples of the prior are points, which cost nothing."""
        if not draws_points(self.config.model.name):
            return None
        with self.core.meter.paused("evaluation"):
            return trace_core(self.evaluator.core, self.config, self.prompts)

    def _ended(self, measurements: list[Measurement]) -> list[Measurement]:
        """The measurements, with a note if a bound ended training, and one if scores were missing in it."""
        if self.trainer is None or not measurements:
            return measurements
        train = self.config.train
        if (kl := self.trainer.ended_at_kl) is not None:
            text = f"training ended after update {self._updates} of {train.updates}, at {kl:.3g} nats on its own "
            text += f"samples: train.max_path_kl = {train.max_path_kl:g}"
            measurements = self._noted(measurements, "path_kl", text)
        if missing := self.trainer.missing_scores:
            text = f"in training {missing} samples had no score; the groups of their prompts were left out"
            measurements = self._noted(measurements, "reward/train", text)
        return measurements

    def _noted(self, measurements: list[Measurement], name: str, text: str) -> list[Measurement]:
        """The measurements with a note at the one of this name, or else at the first; it is printed too."""
        self.console.print(f"Note: {text}.")
        noted = next((one for one in measurements if one.name == name), measurements[0])
        note = "; ".join(filter(None, (noted.note, text)))
        return [replace(one, note=note) if one is noted else one for one in measurements]

    @property
    def _updates(self) -> int:
        return self.trainer.update if self.trainer else 0

    def _rows(self, measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
        updates, counts = self._updates, self.core.meter.total()
        return [row(self.config, self.prompts, counts, self.info, one, updates) for one in measurements]

    # Training -----------------------------------------------------------------------------------------------------

    def _train(self, trainer: Trainer, stored: Callable[[], None]) -> None:
        """Train to the end, with the evaluations between updates."""
        config = self.config
        between = set(config.evaluated_at()) - {config.train.updates}
        if not trainer.done:
            trainer.prior_rewards = self._prior_rewards()
        if self.log and trainer.update:
            for record in read_log(self.folder).to_dict("records"):
                self.alarms.update(record)
        with training_progress(self.console) as progress:
            shown: dict[str, Any] = {"reward": float("nan"), "left": ""}
            task = progress.add_task(config.method.name, total=config.train.updates, completed=trainer.update, **shown)
            begun, said = time.monotonic(), False

            def on_update(record: Record) -> None:
                nonlocal said
                if self.log:
                    self.log.write(record)
                    self.alarms.update(record)
                left = self._left(record)
                if not said and not trainer.part and time.monotonic() - begun > SETTLED:
                    self.console.print(f"Left: {left}.")
                    said = True
                shown = {"reward": record.get("reward", float("nan")), "left": left}
                progress.update(task, completed=record["update"], **shown)

            def after_update(update: int) -> None:
                if update in between and not trainer.done:
                    self._evaluate_between(update)
                    stored()

            # a run that was interrupted during an evaluation resumes from the checkpoint before it
            evaluated = processes.from_main(lambda: (self.folder / rows_at(trainer.update)).is_file())
            if trainer.update in between and not (trainer.done or evaluated):
                self._evaluate_between(trainer.update)
            trainer.run(on_update, after_update, between, stored)

    def _left(self, record: Record) -> str:
        """How long the run will still take, from its latest log record."""
        pace = Pace.of(self.config, record)
        return time_text(*seconds_left(self.config, pace, self.evaluator.rows("finetuned"), record["update"]))

    def _prior_rewards(self) -> dict[str, float]:
        """Mean reward of the prior for each training prompt, on a set that the evaluation needs anyway."""
        with evaluating(self.evaluator, self.console) as on_batch:
            prior = self.evaluator.prior_set("prior", lambda rows: on_batch("prior", rows))
        rewards = prior.rewards[self.config.reward.name]
        means = {prompt: float(rewards[rows].nanmean()) for prompt, rows in prior.rows("train").items()}
        return {prompt: mean for prompt, mean in means.items() if math.isfinite(mean)}  # one may have no score at all

    def _evaluate_between(self, update: int) -> None:
        with self.core.meter.paused("evaluation"):
            evaluation, measurements = self.evaluator.evaluate()
        rows = self._rows(self.alarms.noted(measurements, evaluation.finetuned.step_kl))
        if self.log:
            self.log.evaluated(update, evaluation, measurements)
            write_rows(self.folder / rows_at(update), rows)

    def _save_adapter(self, trainer: Trainer) -> None:
        """Save the adapter, and beside it what else the evaluation samples with: a copy, the method's networks."""
        model, name = self.core.model, self.config.evaluation.weights
        model.save(self.folder / "adapter")
        if not trainer.method.needs.adapters:
            save_networks(self.core.networks, self.folder / "adapter")
        if name != "policy":
            policy = {key: p.data for key, p in model.adapters().items()}
            for key, parameter in model.adapters().items():
                parameter.data = self.core.copies[name][key]
            model.save(self.folder / self.config.adapter_name())
            for key, parameter in model.adapters().items():
                parameter.data = policy[key]
        for file in self.folder.glob("adapter*/**/*.safetensors"):  # safetensors lets the owner alone read them
            shutil.copymode(self.folder / "config.yaml", file)

    # Pictures -----------------------------------------------------------------------------------------------------

    def _pictures(
        self, evaluation: Evaluation, measurements: Sequence[Measurement], rows: list[dict[str, Any]]
    ) -> None:
        config = self.config
        title = f"{config.method.name} on {config.reward.name} ({config.model.name})"
        if (self.folder / "log.jsonl").is_file():
            frame = read_log(self.folder)
            frame = frame.drop(columns="seconds/evaluation", errors="ignore")
            times = [name for name in frame if name.startswith("seconds/")]
            totals = frame[times].fillna(0.0)  # a phase that has not occurred yet is missing
            frame[times] = totals.diff().fillna(totals)
            evaluations = pd.concat([*self._evaluations(), pd.DataFrame(rows)])
            evaluations = evaluations[evaluations["metric"] == "reward/train"].sort_values("updates")
            plot_curves(frame, self.folder / "curves.png", title, evaluations)
        draw_samples(evaluation, measurements, self.core, self.folder, title)

    def _evaluations(self) -> Iterator[pd.DataFrame]:
        """Rows of the evaluations between updates; damaged files are left out with a warning."""
        for path in self.folder.glob(rows_at(0).replace("0000000", "*")):
            try:
                yield read_rows(path)
            except ValueError as error:
                log.warning("%s", error)
