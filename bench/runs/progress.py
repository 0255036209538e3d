"""Progress bars of training and evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.evaluation.evaluator import Evaluator
from bench.metric import Evaluation, Measurement


def training_progress(console: Console) -> Progress:
    """The progress bar of training: update, reward, time left with the evaluations."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}"),
        TextColumn("{task.fields[left]}"),
        console=console,
    )


def evaluate(evaluator: Evaluator, console: Console) -> tuple[Evaluation, list[Measurement]]:
    """Evaluate the core's model with a progress bar; the meter counts only the time."""
    with evaluating(evaluator, console) as on_batch:
        return evaluator.evaluate(on_batch)


@contextmanager
def evaluating(evaluator: Evaluator, console: Console) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar for each set; yields a function to call with (set, rows finished). The meter is paused."""
    columns = [TextColumn("evaluating {task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def on_batch(name: str, rows: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=evaluator.rows(name))
            progress.advance(tasks[name], rows)

        with evaluator.core.meter.paused("evaluation"):
            yield on_batch
