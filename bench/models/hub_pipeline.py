"""A pipeline of the hub that has no card: its `model_index.json` says which files it needs."""

from dataclasses import dataclass

from bench.hub import Repository
from bench.models.folder import family_of, files_of, used_parts

CONFIGURATIONS = ("model_index.json", "*/*.json", "tokenizer*/*")
WEIGHTS = tuple(  # as far as can be said before the configurations are here; some repositories hold other copies too
    f"{part}/*model{shard}.safetensors"
    for part in ("unet", "transformer", "vae", "text_encoder*")
    for shard in ("", "-*")
)


@dataclass(frozen=True)
class HubPipeline(Repository):
    """A pipeline's repository. The configurations are fetched and judged before the weights.

    t5: with the parts that its family can do without.
    """

    t5: bool = True

    def missing(self) -> list[str]:
        """See `Repository.missing`; patterns, without `model_index.json`. Raises BenchError for its class."""
        if (index := self.cached("model_index.json")) is None:
            return [*CONFIGURATIONS, *WEIGHTS]
        folder = index.parent
        parts = used_parts(folder, family_of(folder), self.t5)
        return [file for part in parts for file in files_of(folder, part) if self.cached(file) is None]

    def download(self) -> None:
        """Fetch the configurations, then the weights that they name."""
        self.snapshot(CONFIGURATIONS)
        super().download()
