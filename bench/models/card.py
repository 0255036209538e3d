"""The card of a named model: everything that the project knows of it. The cards are in `bench.models.cards`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.hub import Repository
from bench.models.architecture import Architecture


@dataclass(frozen=True)
class ModelCard:
    """A named model, whose weights either ship in `folder` or come from the repository `hub`.

    name: what `--model` takes. text: its line in `bench ls models`. licence: of the weights.

    Of one that ships: lender, the folder of another pipeline with the parts that `folder` lacks, and components, a
    function that loads these parts, by the pipeline's names.

    Of one on the hub: size, bytes of its files, about. architecture: its networks, from which memory is estimated and
    random weights are written without any file. shards: number of files of a part's weights, where it is not one.
    optional: parts that `model.t5=false` leaves out, and the bytes of their files.
    """

    name: str
    text: str
    licence: str
    folder: Path | None = None
    lender: Path | None = None
    components: Callable[[], dict[str, Any]] = dict
    hub: str = ""
    size: int = 0
    architecture: Architecture | None = None
    shards: Mapping[str, int] = field(default_factory=dict)
    optional: Mapping[str, int] = field(default_factory=dict)

    def repository(self, t5: bool = True) -> Repository:
        """The files that a run needs of the hub repository; t5: with the optional parts."""
        assert self.architecture, f"{self.name} ships"
        left_out = {} if t5 else self.optional
        parts = [part for part in self.architecture.networks if part not in left_out]
        files = ["model_index.json", "scheduler/scheduler_config.json"]
        for part in parts:
            files += [f"{part}/config.json", *_weights(part, self.shards.get(part, 1))]
            if part.startswith("text_encoder"):
                files.append(f"{part.replace('text_encoder', 'tokenizer')}/tokenizer_config.json")
        size = self.size - sum(left_out.values())
        return Repository(self.hub, tuple(files), size=size, also=("tokenizer*/*", "scheduler/*"))


def _weights(part: str, shards: int) -> list[str]:
    stem = f"{part}/{'model' if part.startswith('text_encoder') else 'diffusion_pytorch_model'}"
    if shards == 1:
        return [f"{stem}.safetensors"]
    numbered = [f"{stem}-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    return [f"{stem}.safetensors.index.json", *numbered]
