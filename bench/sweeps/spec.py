"""A sweep's specification: what its file may hold, and what is wrong with one."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from bench import shipped
from bench.config import OPTIONS
from bench.errors import BenchError, disk_error
from bench.options import Config, Distinct, explain, leaves
from bench.runtime import yaml_text
from bench.settings import EXECUTION, Seed
from bench.sweeps import tune as tuning

OWN = {  # settings that have a place of their own in a sweep, whose value would be passed over or win unseen
    "seed": "seeds",
    "train.threads": "threads",
    **{key: f"{option[2:]}s" if option == "--method" else option[2:] for key, option in OPTIONS.items()},
}


class Sweep(Config):
    """A sweep's specification; of settings later ones win: `set`, `settings`, `grid`, tuned ones."""

    suite: str | None = None
    reward: str | None = None
    model: str | None = None
    methods: Annotated[list[str], Distinct] = Field(min_length=1)
    seeds: Annotated[list[Annotated[Seed, Field(strict=True)]], Distinct] = Field(
        [0], min_length=1, description="a list, or a count (0, 1, …)"
    )
    set: dict[str, Any] = Field({}, description="settings of every run")
    settings: dict[str, dict[str, Any]] = Field({}, description="further settings by method")
    grid: dict[str, tuning.Values] = Field({}, description="setting → values; every combination is run")
    tune: tuning.Tune | None = Field(None, description="choose settings of every method at every point of the grid")
    nfe: int | None = Field(None, ge=1, description="NFE of every training, forward and backward; gives train.updates")
    workers: int | None = Field(None, ge=1, description="runs at once; null: what cores and GPUs allow")
    threads: int = Field(1, ge=1, description="CPU threads of a run")
    gpus: int = Field(0, ge=0, description="GPUs of a run, one process on each; 0: whatever it finds")
    track: Annotated[list[str], Distinct] = Field([], description="of every run, by the names that accelerate knows")
    out: Path = Field(Path(), description="folder of the runs; without one runs/<name of the file>")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, seeds: Any) -> Any:
        return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    def settings_by_place(self) -> dict[str, list[str]]:
        """Part of the file that holds settings → their dotted keys."""
        places = {"set": self.set, **{f"settings of {name}": tree for name, tree in self.settings.items()}}
        places |= {"grid": self.grid} | ({"tune.set": self.tune.set, "tune.grid": self.tune.grid} if self.tune else {})
        return {place: [key for key, _ in leaves(tree)] for place, tree in places.items()}

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every method at every point of the grid."""
        for method, values in itertools.product(self.methods, itertools.product(*self.grid.values())):
            yield method, dict(zip(self.grid, values, strict=True))


def read_sweep(path: Path) -> Sweep:
    """A specification file, or a sweep that ships, by name. Raises BenchError listing every mistake that it shows."""
    path = shipped.find("sweeps", path)
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf8"))
        if not isinstance(tree, dict):
            raise ValueError("it holds no `key: value` lines")
        spec = Sweep(**tree)
    except ValidationError as error:
        keys = list(Sweep.model_fields)
        raise BenchError("\n".join(f"{path}: {explain(mistake, keys)}" for mistake in error.errors())) from None
    except OSError as error:
        raise BenchError(disk_error(error, path)) from None
    except (ValueError, TypeError) as error:
        raise BenchError(f"cannot read the sweep {path}: {error}.") from None
    if mistakes := [*_misplaced(spec), *(_mistuned(spec, spec.tune) if spec.tune else ())]:
        raise BenchError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return spec if "out" in spec.model_fields_set else spec.model_copy(update={"out": Path("runs") / path.stem})


def _misplaced(spec: Sweep) -> Iterator[str]:
    """Settings in a place where they would do nothing, or another's work."""
    if strangers := spec.settings.keys() - set(spec.methods):
        yield f"settings for {', '.join(sorted(strangers))}, which methods: does not list."
    for place, keys in spec.settings_by_place().items():
        if idle := set(keys) & set(EXECUTION) if place in ("grid", "tune.grid") else ():
            yield f"{', '.join(sorted(idle))} in {place}: makes no other run; put one value under set."
        for key in dict.fromkeys(keys):
            if keys.count(key) > 1:
                yield f"{key} is given twice under {place}."
            if key in OWN:
                yield f"{key} under {place}: give it as {OWN[key]}."
            if key == "train.updates" and spec.nfe:
                yield f"train.updates under {place}: nfe gives it; take one away."


def _mistuned(spec: Sweep, tune: tuning.Tune) -> Iterator[str]:
    """Contradictions between the tuning and the rest."""
    if tune.seed in spec.seeds:
        yield f"tune.seed = {tune.seed} is a seed of the table: tune on another."
    places = spec.settings_by_place()
    tuned = places.pop("tune.grid")
    for place, keys in places.items():
        if twice := sorted(key for key in tuned if any(_overlap(key, other) for other in keys)):
            yield f"{', '.join(twice)} is tuned, and stands under {place} too: take one away."
    if tune.updates and any(_overlap("train.updates", key) for key in [*places["tune.set"], *tuned]):
        yield "train.updates of a trial is given twice, and under tune.updates once: take one away."


def _overlap(key: str, other: str) -> bool:
    """Whether one dotted key is the other or a part of it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
