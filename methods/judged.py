"""A model that was finetuned elsewhere, as `bench judge` measures it."""

from collections.abc import Iterator

from pydantic import Field

from bench import Batch, Config, Core, Loss, Method, Needs


class Stated(Config):
    """What the author says that the training cost; null: unknown."""

    nfe: int | None = Field(None, ge=0, description="network evaluations, forward and backward")
    reward_calls: int | None = Field(None, ge=0)
    gpu_hours: float | None = Field(None, ge=0)


class JudgedConfig(Config):
    """What is judged. `bench judge` fills it in."""

    label: str = Field("", description="what tables call it")
    sources: list[str] = Field([], description="names of files or folders, or hub ids with their commits")
    scales: list[float] = Field([], description="of each source, if they are adapters")
    digest: str = Field("", description="of the files' contents")
    cost: Stated = Stated()


class Judged(Method):
    """A model that was finetuned elsewhere: `bench judge` measures it, nothing is trained."""

    Config = JudgedConfig
    needs = Needs(training=False)
    config: JudgedConfig

    def losses(self, core: Core, data: Batch) -> Iterator[Loss]:
        """Nothing to train."""
        return iter(())

    def unfit(self, steps: int, group: int) -> str | None:
        """Without weights it would be the prior."""
        return None if self.config.sources else "no weights are named: bench judge SOURCE names and measures them"
