"""Signs that a run went wrong although every number is finite: warned of once, and noted in the table."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.metric import Measurement
from bench.reporting.table import is_clear, number
from bench.runtime import processes

GROWTH, SETTLED = 1e4, 4  # a loss above so many times the largest before it, after so many updates
NATS, TIMES = 100.0, 10.0  # a path_kl above both: so many nats, and so many times β × the reward gained
log = logging.getLogger(__name__)


class Alarms:
    """What a run watches; every kind of sign is warned of once."""

    def __init__(self, beta: float):
        self.beta = beta
        self.largest, self.seen, self.loss_note = 0.0, 0, ""
        self._told: set[str] = set()

    def update(self, record: Mapping[str, Any]) -> None:
        """Look at an update's log record. The largest loss counts, for a policy gradient's may be next to zero."""
        loss = abs(record.get("loss", 0.0))
        if self.seen >= SETTLED and loss > GROWTH * self.largest > 0 and not self.loss_note:
            self.loss_note = (
                f"the loss grew from {number(self.largest)} to {number(loss)} at update {record['update']}: "
                "try a lower optimizer.lr"
            )
            self._warn("loss", self.loss_note)
        self.largest, self.seen = max(self.largest, loss), self.seen + 1

    def noted(self, found: list[Measurement]) -> list[Measurement]:
        """The measurements with notes on what is wrong: a reward below the prior's, a path_kl that explodes, a loss.

        The optimum of the tilt has `path_kl ≤ β × gain`, the gain in mean reward.
        """
        by_name = {one.name: one for one in found}
        trained = by_name.get("reward/train")
        gain = trained.difference if trained and trained.difference is not None else 0.0
        notes = {}
        for name in ("reward/train", "reward/heldout"):
            one = by_name.get(name)
            if one and is_clear(vars(one)) and one.difference < 0:
                notes[name] = "fell below the prior's: training made it worse"
        kl = by_name["path_kl"].value if "path_kl" in by_name else None
        if kl is not None and kl > max(NATS, TIMES * self.beta * gain):
            notes["path_kl"] = (
                f"exploded: {number(kl)} nats, where a reward gain of {number(gain)} is worth "
                f"{number(max(0.0, self.beta * gain))} at β = {self.beta:g}; the policy has left the prior"
            )
        for name, note in notes.items():
            self._warn(name, f"{name} {note}")
        if self.loss_note and found:
            first = trained.name if trained else found[0].name
            notes[first] = "; ".join(filter(None, (notes.get(first), self.loss_note)))
        return [
            replace(one, note="; ".join(filter(None, (one.note, notes[one.name])))) if one.name in notes else one
            for one in found
        ]

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._told and processes.is_main():
            self._told.add(kind)
            log.warning("%s", text)
