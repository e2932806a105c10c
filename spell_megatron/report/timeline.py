"""What trainer and engines did in each step, from a run's timeline.jsonl."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from spell_megatron.files import json_lines
from spell_megatron.monitoring.timeline import ENGINES, TRAINER

WORDS = {
    "rollout": "blue",
    "validation": "red",
    "accumulate": "teal",
    "update": "orange",
    "push": "green",
    "checkpoint": "purple",
}
"""Names of spans in the order of the legend, with their colours, those of the panel above; any other is grey."""

MOST_STEPS = 200
"""Steps of a run that a page holds, spread evenly."""

GAP = 1 / 500
"""Spans of one name that are closer than this share of the step are drawn as one."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """Work from `start` to `end`, in seconds since 1970, in the lanes of those that did it."""

    step: int | None
    name: str
    lanes: tuple[str, ...]
    start: float
    end: float


@dataclass
class StepSpans:
    """The spans of a step, which ends where the next one begins."""

    step: int
    begun: int
    """Number of the start of the run that made it."""
    start: float
    end: float
    spans: list[Span] = field(default_factory=list)

    def when(self, *names: str) -> list[Interval]:
        """When there was work of these names."""
        return union((span.start, span.end) for span in self.spans if span.name in names)

    def work(self, lane: str) -> list[Interval]:
        """When a lane was at work."""
        return union((span.start, span.end) for span in self.spans if lane in span.lanes)


def read_timeline(folder: Path) -> list[Span]:
    """All spans of a run, of all its starts, in the order in which they ended; lines that are none are left out."""
    path = folder / "timeline.jsonl"
    if not path.is_file():
        return []
    return [span for _, record, _ in json_lines(path) if (span := _span(record))]


def _span(record: Any) -> Span | None:
    try:
        step, name, lanes = record["step"], str(record["name"]), tuple(map(str, record["lanes"]))
        start, end = float(record["start"]), float(record["end"])
    except (KeyError, TypeError, ValueError):
        return None
    whole = step is None or (isinstance(step, int) and not isinstance(step, bool))
    return Span(step, name, lanes, start, end) if whole and start <= end else None


def steps_of(spans: Iterable[Span]) -> list[StepSpans]:
    """The spans by step. Of a step that a resumed run made again, the last time counts."""
    steps: dict[int, StepSpans] = {}
    starts, newest = 0, -1
    before_first = True
    for span in spans:
        if span.step is None:
            starts += not before_first
            before_first = True
            continue
        if before_first and span.step <= newest:
            steps = {step: kept for step, kept in steps.items() if step < span.step}
        before_first, newest = False, span.step
        step = steps.setdefault(span.step, StepSpans(span.step, starts, span.start, span.end))
        step.spans.append(span)
        step.start, step.end = min(step.start, span.start), max(step.end, span.end)
    found = list(steps.values())
    for step, after in pairwise(found):
        if step.begun == after.begun:
            step.end = max(step.end, after.start)
    return found


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """The same time without overlaps, in order; gaps of up to so many seconds are closed."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def seconds(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def common(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The time that is in both of two unions."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def timeline(spans: Sequence[Span], made: Collection[int]) -> dict[str, Any] | None:
    """What the page shows of a run's timeline; None: it has none.

    Only steps that the run has `made` count: of one that is under way, or was given up, spans are missing.
    `steps` are those to draw: the spans of a lane are [number of the name, seconds since the step's start, seconds],
    `work` are the seconds at work in each lane.
    The other numbers are seconds over all steps: of each name, at work in each lane, of work on the update while
    the engines wrote (`hidden`), and in all.
    """
    steps = [step for step in steps_of(spans) if step.step in made]
    if not steps:
        return None
    names = list(dict.fromkeys([*WORDS, *(span.name for step in steps for span in step.spans)]))
    whole = dict.fromkeys(names, 0.0)
    work = {TRAINER: 0.0, ENGINES: 0.0}
    hidden = 0.0
    for step in steps:
        for lane in work:
            work[lane] += seconds(step.work(lane))
        for name in {span.name for span in step.spans}:
            whole[name] += seconds(step.when(name))
        hidden += seconds(common(step.when("update", "accumulate"), step.when("rollout")))
    return {
        "names": [[name, WORDS.get(name, "grey"), round(whole[name], 3)] for name in names],
        "work": {lane: round(total, 3) for lane, total in work.items()},
        "hidden": round(hidden, 3),
        "seconds": round(sum(step.end - step.start for step in steps), 3),
        "count": len(steps),
        "steps": [_drawn(step, names) for step in _spread(steps)],
    }


def _spread(steps: list[StepSpans]) -> list[StepSpans]:
    """At most `MOST_STEPS` of the steps, with the first and the last."""
    count = min(MOST_STEPS, len(steps))
    return [steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)]


def _drawn(step: StepSpans, names: Sequence[str]) -> dict[str, Any]:
    length = step.end - step.start
    lanes: dict[str, list[list[float]]] = {TRAINER: [], ENGINES: []}
    for lane, drawn in lanes.items():
        for number, name in enumerate(names):
            times = [(span.start, span.end) for span in step.spans if span.name == name and lane in span.lanes]
            for start, end in union(times, GAP * length):
                drawn.append([number, round(start - step.start, 3), round(end - start, 3)])
    work = [round(seconds(step.work(lane)), 3) for lane in lanes]
    return {"step": step.step, "seconds": round(length, 3), "work": work, **lanes}
