"""The card of a named model: everything that the project knows of it. The cards are in `bench.models.cards`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.few_step import FewStep
from bench.hub import Repository
from bench.models.architecture import Architecture


@dataclass(frozen=True)
class ModelCard:
    """name: what `--model` takes. text: its line in `bench ls models`. licence: of the weights.

    few_step: of a student that was distilled to few steps.
    """

    name: str
    text: str
    licence: str
    few_step: FewStep | None = field(default=None, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class EmbeddedCard(ModelCard):
    """A model whose weights ship, in `folder`.

    lender: the folder of another pipeline that holds the parts which `folder` lacks. components: loads these parts, by
    the pipeline's names.
    """

    folder: Path
    lender: Path | None = None
    components: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class HubCard(ModelCard):
    """A model whose weights are fetched from the hub repository `hub`.

    size: bytes of its files, about. architecture: its networks, from which memory is estimated and random weights are
    written without any file. shards: how many files hold a part's weights, where it is not one.
    optional: parts that `model.t5=false` leaves out, and the bytes of their files.
    """

    hub: str
    size: int
    architecture: Architecture
    shards: Mapping[str, int] = field(default_factory=dict)
    optional: Mapping[str, int] = field(default_factory=dict)

    def repository(self, t5: bool = True) -> Repository:
        """The files that a run needs of the hub repository; t5: with the optional parts."""
        left_out = {} if t5 else self.optional
        files = ["model_index.json", "scheduler/scheduler_config.json"]
        for part in (name for name in self.architecture.networks if name not in left_out):
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
