"""Signs that a run went wrong although all numbers are finite: one warning each, and a note in the table."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bench.metric import Measurement
from bench.prompts import SPLITS
from bench.reporting.table import is_clear, number
from bench.runtime import processes

GROWTH, SETTLED = 1e4, 4  # alarm if, after SETTLED updates, a loss exceeds GROWTH times the largest before it
MOST = 0.3  # alarm if a step holds a larger share of path_kl, or of few steps over three times an equal share
LITTLE = 0.1  # nats; of a smaller path_kl the shares say nothing
NATS, TIMES = 100.0, 10.0  # alarm if path_kl exceeds both NATS and TIMES × β × the reward gained
log = logging.getLogger(__name__)


class Alarms:
    """Watches a run and warns once of each kind of sign."""

    def __init__(self, beta: float):
        self.beta = beta
        self.largest, self.seen, self.loss_note = 0.0, 0, ""
        self._warned: set[str] = set()

    def update(self, record: Mapping[str, Any]) -> None:
        """Look at the log record of an update. Losses near zero occur, so the largest so far is compared."""
        loss = abs(record.get("loss", 0.0))
        if self.seen >= SETTLED and loss > GROWTH * self.largest > 0 and not self.loss_note:
            self.loss_note = (
                f"the loss grew from {number(self.largest)} to {number(loss)} at update {record['update']}: "
                "try a lower optimizer.lr"
            )
            self._warn("loss", self.loss_note)
        self.largest, self.seen = max(self.largest, loss), self.seen + 1

    def noted(self, measurements: list[Measurement], step_kl: Tensor | None = None) -> list[Measurement]:
        """The measurements with notes: a reward below the prior's, a path_kl that explodes or is one step's, a loss.

        step_kl: of the samples, [N, K], if it is known. The optimum of the tilt has `path_kl ≤ β × gain`, the gain in
        mean reward.
        """
        by_name = {one.name: one for one in measurements}
        trained = by_name.get("reward/train")
        gain = trained.difference if trained and trained.difference is not None else 0.0
        notes = {}
        for name in (f"reward/{split}" for split in SPLITS):
            one = by_name.get(name)
            if one and one.difference is not None and is_clear(vars(one)) and one.difference < 0:
                notes[name] = "fell below the prior's: training made it worse"
        kl = by_name["path_kl"].value if "path_kl" in by_name else None
        if kl is not None and kl > max(NATS, TIMES * self.beta * gain):
            notes["path_kl"] = (
                f"exploded: {number(kl)} nats, where a reward gain of {number(gain)} is worth "
                f"{number(max(0.0, self.beta * gain))} at β = {self.beta:g}; the policy has left the prior"
            )
        for name, note in notes.items():
            self._warn(name, f"{name} {note}")
        if one_step := _one_step(step_kl):
            self._warn("one step", f"path_kl: {one_step}")
            notes["path_kl"] = "; ".join(filter(None, (notes.get("path_kl"), one_step)))
        if self.loss_note and measurements:
            first = trained.name if trained else measurements[0].name
            notes[first] = "; ".join(filter(None, (notes.get(first), self.loss_note)))
        return [
            replace(one, note="; ".join(filter(None, (one.note, notes[one.name])))) if one.name in notes else one
            for one in measurements
        ]

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned and processes.is_main():
            self._warned.add(kind)
            log.warning("%s", text)


def _one_step(step_kl: Tensor | None) -> str:
    """What to say if one step holds too much of the KL; "" if none does."""
    if step_kl is None:
        return ""
    steps = step_kl.double().mean(0)
    most, total = float(steps.max()), float(steps.sum())
    if total < LITTLE or most <= max(MOST, 3 / len(steps)) * total:
        return ""
    return (
        f"step {int(steps.argmax()) + 1} of {len(steps)} holds {most / total:.0%} of it: sampler.spacing=logsnr with "
        "sampler.final_alpha=0.99 (of a flow sampler.final_noise=0.06) shares it among the steps"
    )
