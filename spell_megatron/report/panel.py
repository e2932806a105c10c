"""What a panel of the report is made of: curves, groups of curves, and the forms that they often have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["share", "number", "tokens", "seconds"]

COLOURS = ("blue", "orange", "green", "purple", "red", "teal", "pink", "brown")
"""Names in the page's palette."""

ROLES = {"questioner": "questions", "responder": "answers", "verifier": "judgments"}
ROLE_COLOURS = ("orange", "blue", "green")


@dataclass(frozen=True)
class Series:
    """One curve: the sum of `metrics`, in a colour of the page's palette; `error` names its standard error.

    A metric whose name has a minus before it is subtracted where it was logged.
    """

    label: str
    metrics: tuple[str, ...]
    colour: str
    error: str | None = None


@dataclass(frozen=True)
class Panel:
    """One plot over the steps. Of its groups of curves it shows one at a time."""

    title: str
    text: str
    unit: Unit
    groups: dict[str, list[Series]]
    stacked: bool = False
    """Curves are shares of a whole, or parts of a sum."""
    log: bool = False
    """A logarithmic axis."""
    sparse: bool = False
    """Measured at few steps: points are drawn, joined by lines, and nothing is averaged."""


@dataclass(frozen=True)
class Section:
    """Panels about one subject."""

    id: str
    title: str
    text: str
    panels: list[Panel] = field(default_factory=list)


def lines(*curves: tuple[str, str], colours: Sequence[str] = COLOURS) -> list[Series]:
    """Curves (label, metric)."""
    return [Series(label, (metric,), colour) for (label, metric), colour in zip(curves, colours, strict=False)]


def single(*curves: tuple[str, str], colours: Sequence[str] = COLOURS) -> dict[str, list[Series]]:
    """The only group of a panel, of curves (label, metric)."""
    return {"": lines(*curves, colours=colours)}


def by_task(tasks: Sequence[str], metric: str) -> list[Series]:
    """A curve for each task; `metric` has {task} in place of it."""
    return lines(*((task, metric.format(task=task)) for task in tasks))


def all_or_by_task(tasks: Sequence[str], label: str, name: str) -> dict[str, list[Series]]:
    """Two groups of the metric `name` below selfplay/: over all tasks, and a curve for each task."""
    return {"all tasks": lines((label, f"selfplay/{name}")), "by task": by_task(tasks, f"selfplay/{{task}}/{name}")}


def roles_and_tasks(tasks: Sequence[str], name: str) -> dict[str, list[Series]]:
    """Groups of the metric `name` of the roles: a curve for each role, and for each role a curve for each task."""
    curves = ((label, f"selfplay/{role}/{name}") for role, label in ROLES.items())
    groups = {"by role": lines(*curves, colours=ROLE_COLOURS)}
    for role, label in reversed(ROLES.items()):
        groups[f"{label} by task"] = by_task(tasks, f"selfplay/{{task}}/{role}/{name}")
    return groups


def all_and_tasks(tasks: Sequence[str], curves: dict[str, str]) -> dict[str, list[Series]]:
    """Groups of curves `label: metric below selfplay/`: one group over all tasks, one for each task."""
    over_all = {"all tasks": lines(*((label, f"selfplay/{name}") for label, name in curves.items()))}
    return over_all | {t: lines(*((label, f"selfplay/{t}/{name}") for label, name in curves.items())) for t in tasks}
