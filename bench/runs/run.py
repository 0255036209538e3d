"""One run, from its configuration to its folder."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from bench.models.elsewhere.sources import Source, stage
from bench.reporting.rows import read_rows
from bench.reporting.table import run_table
from bench.runs.build import use_threads
from bench.runs.execution import Execution
from bench.runs.folder import take_folder, traceback_log
from bench.runs.out_of_memory import explain_out_of_memory
from bench.runs.preflight import preflight
from bench.runs.remote import Mirror
from bench.runtime import processes
from bench.runtime.files import naming_disk_errors
from bench.settings import RunConfig


@dataclass
class Run:
    """A run's configuration, its folder, and where it prints to.

    judged: what `bench judge` measures in it. mirror: of its folder, if its place is a URL.
    """

    config: RunConfig
    folder: Path
    console: Console
    trackers: Sequence[str] = ()
    judged: Sequence[Source] = ()
    mirror: Mirror | None = None

    def go(self, force: bool, locks: ExitStack) -> bool:
        """Train and evaluate what is not done yet; False if the run is already finished in the folder.

        locks: holds the folder's lock. Call `preflight` first, so that an impossible run leaves no folder.
        """
        here = nullcontext[Callable[[], None]](lambda: None)
        mirrored = self.mirror.opened(locks) if self.mirror and processes.is_main() else here
        with naming_disk_errors(self.folder), mirrored as store:
            take = partial(take_folder, self.folder, self.config, self.console, force, locks)
            finished = processes.from_main(take)
            if not finished:
                with traceback_log(self.folder):
                    with processes.main_first():
                        if processes.is_main():
                            stage(self.judged, self.folder / "adapter")
                    prompts = preflight(self.config)
                    use_threads(self.config)
                    with explain_out_of_memory(self.config, self.folder):
                        Execution(self.config, self.folder, self.console, prompts, self.trackers).run(store)
        return not finished

    def report(self) -> None:
        """Print the table of the finished run and the files in its folder."""
        self.console.print(run_table(read_rows(self.folder / "rows.parquet")))
        names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        place = self.mirror.url if self.mirror else self.folder
        self.console.print(f"Results in {place}: {', '.join(names)}")
