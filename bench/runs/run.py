"""One run, from its configuration to its folder: train, evaluate, rows, pictures."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.core import Core
from bench.errors import NonFiniteError
from bench.evaluation.alarms import Alarms
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.image_folder import EACH, save_images
from bench.evaluation.pictures import draw_samples
from bench.hub import project_cache
from bench.metric import Evaluation, Measurement
from bench.prompts import PromptSet
from bench.reporting.plots import plot_curves
from bench.reporting.rows import read_rows, write_rows
from bench.reporting.table import run_table
from bench.runs.adapter import adapter_name, finish_adapter
from bench.runs.build import build_core, build_method, evaluation_core, use_threads
from bench.runs.folder import take_folder, traceback_log
from bench.runs.log import UpdateLog, read_log, training_progress
from bench.runs.out_of_memory import explain_out_of_memory
from bench.runs.preflight import preflight
from bench.runs.rows import prior_settings, provenance, row
from bench.runs.trackers import open_trackers
from bench.runtime import memory, processes
from bench.runtime.files import naming_disk_errors, write_atomic
from bench.sampling.kernel import Kernel
from bench.settings import RunConfig
from bench.training.trainer import Record, Trainer

ONE_STEP = 0.9  # a share of all weights; the default grid of Stable Diffusion 1.5 with 20 steps has 0.73
log = logging.getLogger(__name__)


def rows_at(update: int) -> str:
    """Name of the rows of an evaluation between updates."""
    return f"rows-at-{update:07d}.parquet"


@dataclass
class Run:
    """A run's folder and how it reports to people."""

    config: RunConfig
    folder: Path
    console: Console
    trackers: Sequence[str] = ()

    def go(self, force: bool, locks: contextlib.ExitStack) -> bool:
        """Train and evaluate what is not done yet; False if the run is already finished in the folder.

        locks: holds the folder's lock. Call `preflight` first, so that an impossible run leaves no folder.
        """
        with naming_disk_errors(self.folder):
            with processes.main_first():
                finished = take_folder(self.folder, self.config, self.console, force and processes.is_main(), locks)
            if not finished:
                with traceback_log(self.folder):
                    prompts = preflight(self.config)
                    use_threads(self.config)
                    with explain_out_of_memory(self.config, self.folder):
                        self._execute(prompts)
        return not finished

    def _execute(self, prompts: PromptSet) -> None:
        """Train or resume, evaluate, and write the results to the folder."""
        config = self.config
        info = provenance(config) | {"processes": processes.count()}
        main, alarms = processes.is_main(), Alarms(config.reward.beta)
        if main:
            write_atomic(self.folder / "environment.json", json.dumps(info, indent=2).encode())
        method, trainer = build_method(config), None
        with memory.phase("loading"):
            core = build_core(config)
            evaluator = Evaluator(evaluation_core(core, config), config, prompts, project_cache(), method)
            if method.needs.training:
                trainer = Trainer(core, method, prompts.train, config.train, config.optimizer, self.folder)
        info["prior"] = prior_settings(config, evaluator.core.model)
        if main and core.model.device.type == "cuda":
            self.console.print(f"train.micro_batch = {core.micro_batch}, train.sample_batch = {core.sample_batch}")
        pipeline = getattr(core.model, "pipeline", None)
        if main and pipeline:
            warn_of_cut([*prompts.train, *prompts.heldout], pipeline.tokenizer)
        if main and method.needs.density:
            warn_of_one_step(core.kernel)

        def rows(measurements: list[Measurement]) -> list[dict[str, Any]]:
            updates, counts = trainer.update if trainer else 0, core.meter.total()
            return [row(config, prompts, counts, info, measurement, updates) for measurement in measurements]

        if trainer and trainer.resume():
            self.console.print(f"Resuming after update {trainer.update} of {config.train.updates}.")
        updates = None
        if main and trainer:
            updates = UpdateLog(self.folder, trainer.update, open_trackers(self.trackers, self.folder, config))

        def evaluate_between(update: int) -> None:
            with core.meter.paused("evaluation"):
                evaluation, measurements = evaluator.evaluate()
            if updates:
                updates.evaluated(update, evaluation, measurements)
                write_rows(self.folder / rows_at(update), rows(alarms.noted(measurements)))

        try:
            with updates or contextlib.nullcontext():
                if trainer:
                    self._train(trainer, evaluator, alarms, updates, evaluate_between)
                    if main:
                        self._save(core)
                evaluation, measurements = evaluate(evaluator, self.console)
                if updates:
                    updates.evaluated(trainer.update, evaluation, measurements)
        except NonFiniteError as error:  # a failure is a result too
            failed = rows([Measurement("run", None, direction="none", note=str(error))])[0] | {"status": "failed"}
            if main:
                write_rows(self.folder / "rows.parquet", [failed])
            processes.state().wait_for_everyone()  # a launcher ends all processes when the first one fails
            raise
        final_rows = rows(alarms.noted(measurements))
        if main:
            self._pictures(evaluation, measurements, final_rows, core)
            if evaluation.finetuned.images.ndim == 4:
                sets = {"finetuned": evaluation.finetuned, "prior": evaluation.prior}
                save_images(self.folder / "images", sets, seed=evaluator.seed, each=EACH)
                if trainer and pipeline:
                    finish_adapter(self.folder, config, core.model, final_rows, evaluation.finetuned.prompts[0])
            write_rows(self.folder / "rows.parquet", final_rows)  # written last: it marks the run as finished

    def _save(self, core: Core) -> None:
        """Save the adapter, and beside it the copy that the evaluation samples with."""
        core.model.save(self.folder / "adapter")
        if (name := self.config.evaluation.weights) != "policy":
            policy = {key: p.data for key, p in core.model.adapters().items()}
            for key, parameter in core.model.adapters().items():
                parameter.data = core.copies[name][key]
            core.model.save(self.folder / adapter_name(self.config))
            for key, parameter in core.model.adapters().items():
                parameter.data = policy[key]
        for file in self.folder.glob("adapter*/**/*.safetensors"):  # safetensors lets the owner alone read them
            shutil.copymode(self.folder / "config.yaml", file)

    def _train(
        self,
        trainer: Trainer,
        evaluator: Evaluator,
        alarms: Alarms,
        updates: UpdateLog | None,
        evaluate_between: Callable[[int], None],
    ) -> None:
        config = self.config
        between = set(config.evaluated_at()) - {config.train.updates}
        if trainer.update < config.train.updates:
            # the evaluation needs this set anyway, and with it the log can show the gain in reward
            with evaluating(evaluator, self.console) as on_batch:
                prior = evaluator.prior_set("prior", lambda rows: on_batch("prior", rows))
            rewards = prior.rewards[config.reward.name]
            trainer.prior_rewards = {
                prompt: float(rewards[rows].mean()) for prompt, rows in prior.rows("train").items()
            }
        if updates and trainer.update:
            for record in read_log(self.folder).to_dict("records"):
                alarms.update(record)
        with training_progress(self.console) as progress:
            task = progress.add_task(
                config.method.name, total=config.train.updates, completed=trainer.update, reward=float("nan")
            )

            def on_update(record: Record) -> None:
                if updates:
                    updates.write(record)
                    alarms.update(record)
                progress.update(task, completed=record["update"], reward=record.get("reward", float("nan")))

            def after_update(update: int) -> None:
                if update in between:
                    evaluate_between(update)

            # a run that was interrupted during an evaluation resumes from the checkpoint before it
            if trainer.update in between and not (self.folder / rows_at(trainer.update)).is_file():
                evaluate_between(trainer.update)
            trainer.run(on_update, after_update, between)

    def _pictures(
        self, evaluation: Evaluation, measurements: list[Measurement], rows: list[dict[str, Any]], core: Core
    ) -> None:
        title = f"{self.config.method.name} on {self.config.reward.name} ({self.config.model.name})"
        if (self.folder / "log.jsonl").is_file():
            frame = read_log(self.folder)
            frame = frame.drop(columns="seconds/evaluation", errors="ignore")
            times = [name for name in frame if name.startswith("seconds/")]
            totals = frame[times].fillna(0.0)  # a phase that has not occurred yet is missing
            frame[times] = totals.diff().fillna(totals)
            evaluations = pd.concat([*self._evaluations(), pd.DataFrame(rows)])
            evaluations = evaluations[evaluations["metric"] == "reward/train"].sort_values("updates")
            plot_curves(frame, self.folder / "curves.png", title, evaluations)
        draw_samples(evaluation, measurements, core, self.folder, title)

    def _evaluations(self) -> Iterator[pd.DataFrame]:
        """Rows of the evaluations between updates; damaged files are left out with a warning."""
        for path in self.folder.glob(rows_at(0).replace("0000000", "*")):
            try:
                yield read_rows(path)
            except ValueError as error:
                log.warning("%s", error)

    def report(self) -> None:
        """Print the table of the finished run and the files in its folder."""
        self.console.print(run_table(read_rows(self.folder / "rows.parquet")))
        names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        self.console.print(f"Results in {self.folder}: {', '.join(names)}")


def warn_of_cut(prompts: list[str], tokenizer: Any) -> None:
    """Warn of prompts that are longer than the text encoder reads."""
    limit = tokenizer.model_max_length
    candidates = [prompt for prompt in prompts if len(prompt.encode()) > limit - 3]  # a token is at least a byte
    if candidates and (long := sum(len(t) > limit for t in tokenizer(candidates, verbose=False).input_ids)):
        log.warning("%d of %d prompts are longer than the %d tokens that the encoder reads", long, len(prompts), limit)


def warn_of_one_step(kernel: Kernel) -> None:
    """Warn if nearly all of the weight in a loss of transition densities lies in one step of the sampler."""
    step, share = kernel.largest_weight()
    if share > ONE_STEP:
        log.warning(
            "step %d of %d holds %.0f %% of the sampler's weights (∂μ/∂o / σ)²: the other steps learn little, "
            "at a high path_kl. Leave more noise in the finished sample: sampler.final_noise=0.06 with "
            "sampler.spacing=shifted for a flow, a lower sampler.final_alpha for a diffusion",
            step + 1,
            kernel.steps,
            100 * share,
        )


def evaluate(evaluator: Evaluator, console: Console) -> tuple[Evaluation, list[Measurement]]:
    """Evaluate the core's model with a progress bar; the meter counts only the time."""
    with evaluating(evaluator, console) as on_batch:
        return evaluator.evaluate(on_batch)


@contextlib.contextmanager
def evaluating(evaluator: Evaluator, console: Console) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar for each set; yields a function to call with (set, rows finished). The meter is paused."""
    columns = [TextColumn("evaluating {task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def on_batch(name: str, rows: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=evaluator.rows)
            progress.advance(tasks[name], rows)

        with evaluator.core.meter.paused("evaluation"):
            yield on_batch
