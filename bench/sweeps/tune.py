"""The `tune:` section of a sweep: the same trials for every method.

Trials are ordinary runs on a seed that the sweep's own runs do not have. `choosing.py` chooses among them by the stated
rule, `tuned_file.py` keeps the choices on file.

The stages: trials; those tied with the chosen again with more evaluation samples; the choice; if a winner is
at an edge, a wider grid for all methods and the same again; then the runs of the chosen configurations on the table's
seeds, which are no part of this.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from bench.method import STRENGTHS, Strength
from bench.options import Config, Distinct
from bench.reporting.budgets import KL
from bench.settings import Seed

RATE = "optimizer.lr"
STRENGTH = "strength"  # the axis whose setting every method names itself
Widening = dict[str, list[str]]  # setting, or `STRENGTH` → which ends of its values grow: "smallest", "largest"
Values = Annotated[list[Any], Field(min_length=1), Distinct]  # of a setting, in a grid


class Tune(Config):
    """How settings are chosen; `smallest` or `largest` and the bounds name metrics of a trial's last evaluation.

    `envelope` names a metric whose gain over the prior is set against path_kl, at every evaluation.
    """

    grid: dict[str, Values] = Field(min_length=1, description="setting → values; every combination is a trial")
    strength: bool = Field(False, description="try every value with each of the method's strength, which it declares")
    seed: Seed = Field(description="of the trials; none of the sweep's own")
    smallest: str | None = Field(None, description="the metric (column `metric` of the rows, its `value`) to minimise")
    largest: str | None = Field(None, description="or the one to maximise")
    envelope: str | None = Field(None, description="or the one whose gain is to cost the least path_kl, at every gain")
    most: int = Field(3, ge=1, description="configurations of a method that are kept of its envelope")
    widen: int = Field(0, ge=0, description="how often all grids grow where a method's winner has an extreme value")
    resolve: int = Field(
        1, ge=1, description="factor of the samples with which trials tied with the chosen are made again"
    )
    at_most: dict[str, float] = Field({}, description="metric → bound that the chosen trial must keep")
    at_least: dict[str, float] = Field({}, description="the same from below")
    updates: int | None = Field(None, ge=1, description="of a trial; null: as many as the run has")
    set: dict[str, Any] = Field({}, description="further settings of trials, a cheaper evaluation for one")

    @model_validator(mode="after")
    def _one_rule(self) -> "Tune":
        if sum(name is not None for name in (self.smallest, self.largest, self.envelope)) != 1:
            raise ValueError("name one metric, under smallest:, under largest: or under envelope:")
        if self.envelope and (self.at_most or self.at_least):
            raise ValueError("an envelope has all gains: leave out at_most and at_least")
        if self.strength and RATE not in self.grid:
            raise ValueError(f"strength is tried with learning rates: give values of {RATE} in tune.grid")
        if apart := [name for name, most in self.at_most.items() if self.at_least.get(name, most) > most]:
            raise ValueError(f"no trial can keep both bounds of {apart[0]}: at_least is above at_most")
        return self

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.smallest or self.largest or self.envelope or ""

    def metrics(self) -> list[str]:
        """All that the rule looks at."""
        return [*dict.fromkeys([self.metric, *([KL] if self.envelope else []), *self.at_most, *self.at_least])]

    def points(
        self, strength: Strength | None, own: float | None, widenings: Sequence[Widening] = ()
    ) -> Iterator[dict[str, Any]]:
        """The values of every trial of a method with this strength, whose setting has the value `own` otherwise."""
        axes = self._axes(strength, own, widenings)
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _axes(
        self, strength: Strength | None, own: float | None, widenings: Sequence[Widening]
    ) -> dict[str, list[Any]]:
        """Setting → values. A method without a strength gets as many trials, as learning rates in between."""
        axes: dict[str, list[Any]] = {key: list(values) for key, values in self.grid.items()}
        if self.strength:
            factors = strength.values if strength else tuple(map(float, range(1, STRENGTHS + 1)))
            axes[STRENGTH] = [float(f"{value * own:.6g}") if own is not None else value for value in factors]
        for axis, sides in (item for widening in widenings for item in widening.items()):
            for side in sides:
                axes[axis] = extended(axes[axis], side)
        if self.strength:
            tried = axes.pop(STRENGTH)
            if strength:
                axes[strength.setting] = tried
            else:
                rates = axes[RATE]
                between = np.geomspace(min(rates), max(rates), len(rates) * len(tried))
                axes[RATE] = [float(f"{rate:.3g}") for rate in between]
        return axes

    def settings(self) -> dict[str, Any]:
        """What a trial's settings have apart from the run's: without an envelope it is evaluated at its end only."""
        shorter = {} if self.updates is None else {"train.updates": self.updates}
        return ({} if self.envelope else {"evaluation.at": []}) | {**shorter, **self.set}

    def described(self) -> dict[str, Any]:
        """As `tuned.yaml` has it: options that older files do not know stand there only where they are set."""
        tree = self.model_dump(mode="json")
        later = ("strength", "envelope", "most", "widen", "resolve")
        return {key: value for key, value in tree.items() if key not in later or key in self.model_fields_set}

    def rule(self) -> str:
        """The rule in words."""
        if self.envelope:
            rule = f"envelope of {self.envelope} and {KL}, of at most {self.most} configurations"
        else:
            rule = f"smallest {self.smallest}" if self.smallest else f"largest {self.largest}"
        bounds = [f"{name} at most {bound:g}" for name, bound in self.at_most.items()]
        bounds += [f"{name} at least {bound:g}" for name, bound in self.at_least.items()]
        rule += f" of trials with {' and '.join(bounds)}" if bounds else ""
        return rule + (f"; ties again with {self.resolve} times the samples" if self.resolve > 1 else "")


def extended(values: Sequence[float], side: str) -> list[float]:
    """The values with one more at an end, in the ratio of the two next to it; a value 0 stays the smallest."""
    values = sorted(values)
    if side == "largest":
        return [*values, float(f"{values[-1] ** 2 / values[-2]:.6g}")]
    zero = values[:1] if values[0] == 0 else []
    positive = values[len(zero) :]
    return [*zero, float(f"{positive[0] ** 2 / positive[1]:.6g}"), *positive]
