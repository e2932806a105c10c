"""How long the steps of a run took, without the pauses between its starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from spell_megatron.report.runs import Run

PARTS = ("time/step", "time/validation")
"""What a run measures of a step by a clock that nobody sets."""

PAUSE = 60.0
"""Seconds that must pass without a step being worked on to be a pause."""

LONG = 10
"""A step of which only the time of day is known took no more than so many times the median of such steps."""


@dataclass
class Timing:
    """Times of a run.

    Attributes:
        seconds: of work on each record of the run's log; a record without any measure has 0.
        pauses: (step, seconds): the run stood still for so long before the step, start-up included.
        set_back: steps that were logged at an earlier time of day than the step before.
    """

    seconds: list[float] = field(default_factory=list)
    pauses: list[tuple[int, float]] = field(default_factory=list)
    set_back: list[int] = field(default_factory=list)


def timing(run: Run) -> Timing:
    """How long the steps of a run took.

    The durations that a run logs count. Where they are missing, the times of day at which steps were logged do, as far
    as they can be durations: one that is negative, or ten times the median, is taken for the median.
    """
    gaps = [None, *(_gap(before, after) for before, after in pairwise(run.times))][: len(run.steps)]
    usual = median(gap for gap in gaps if gap and gap > 0) if any(gap and gap > 0 for gap in gaps) else 0.0
    found = Timing()
    for i, (step, gap) in enumerate(zip(run.steps, gaps, strict=True)):
        measured = [max(0.0, value) for part in PARTS if (value := run.column(part)[i]) is not None]
        if measured:
            seconds = sum(measured)
        elif gap is None:
            seconds = 0.0
        else:
            seconds = gap if 0 <= gap <= LONG * usual else usual
        found.seconds.append(seconds)
        if gap is not None and gap < 0:
            found.set_back.append(step)
        elif gap is not None and gap - seconds > PAUSE:
            found.pauses.append((step, gap - seconds))
    return found


def _gap(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def duration(seconds: float) -> str:
    """A duration in words: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
