"""Copies of the adapters that follow them: moving averages, and the policy of an earlier round."""

from collections.abc import Mapping

from torch import Tensor, nn

from bench.method import Copy


def move_copies(
    copies: Mapping[str, Mapping[str, Tensor]],
    schedules: Mapping[str, Copy],
    adapters: Mapping[str, nn.Parameter],
    *,
    updates: int,
    run: int,
    rounds: int | None = None,
) -> None:
    """Move the copies that are due towards the adapters, in place.

    updates: how many are done. run: its rounds. rounds: after a round, how many are done; None after an update.
    """
    for name, schedule in schedules.items():
        if _is_due(schedule, rounds, run):
            share = 1 - schedule.decay(updates)
            for key, value in copies[name].items():
                value.lerp_(adapters[key].detach(), share)


def _is_due(schedule: Copy, rounds: int | None, run: int) -> bool:
    interval = schedule.interval(run)
    if interval is None or rounds is None:
        return interval is None and rounds is None
    return rounds % interval == 0 and (schedule.stages is None or rounds < schedule.stages * interval)
