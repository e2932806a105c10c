"""How the report shows the outcomes of attempts: labels, colours, curves, and how far attempts come."""

from __future__ import annotations

from typing import Any

from spell_megatron.report.panel import Series
from spell_megatron.selfplay.outcomes import Outcome

OUTCOME_COLOURS = {
    Outcome.MIXED: "green",
    Outcome.ALL_1: "blue",
    Outcome.ALL_0: "orange",
    Outcome.UNGROUNDED: "purple",
    Outcome.UNCONFIRMED: "teal",
    Outcome.REPEATED: "pink",
    Outcome.BAD_FORMAT: "red",
}
"""Outcomes with a curve of their own; the others are shown together."""

DROPPED = ("dropped without penalty", "grey")
"""Label and colour of all other outcomes."""


def outcome_labels() -> dict[str, dict[str, str]]:
    """What the page calls an outcome, and its colour; `dropped` where a file does not tell which of several it was."""
    label, colour = DROPPED
    labels = {str(o): {"label": o.meaning, "colour": OUTCOME_COLOURS.get(o, colour)} for o in Outcome}
    return labels | {"dropped": {"label": label, "colour": colour}}


def ends(prefix: str) -> list[Series]:
    """A curve for each outcome that has a colour of its own, and one for all others."""
    own = [Series(o.meaning, (f"{prefix}rate/{o}",), colour) for o, colour in OUTCOME_COLOURS.items()]
    dropped = tuple(f"{prefix}rate/{outcome}" for outcome in Outcome if outcome.dropped)
    return [*own, Series(DROPPED[0], dropped, DROPPED[1])]


def funnel() -> list[dict[str, Any]]:
    """How far attempts come: stages, each with the outcomes of the attempts that reach it."""
    stages = (
        ("attempts", "grey", list(Outcome)),
        ("a usable question", "purple", [outcome for outcome in Outcome if outcome.valid]),
        ("… that needs its documents", "teal", [o for o in Outcome if o.answered or o is Outcome.UNCONFIRMED]),
        ("… that is put to the responder", "orange", [outcome for outcome in Outcome if outcome.answered]),
        ("… that some answers get right", "blue", [Outcome.MIXED, Outcome.ALL_1]),
        ("… and others wrong: mixed", "green", [Outcome.MIXED]),
    )
    return [{"label": label, "colour": colour, "outcomes": outcomes} for label, colour, outcomes in stages]
