"""The table that compares first, last and best values of runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from spell_megatron.report.panel import Unit


@dataclass(frozen=True)
class Row:
    """A row of the table that compares runs."""

    label: str
    metric: str
    unit: Unit
    better: Literal["more", "less", ""] = ""
    """Whether more or less of it is better, if either is."""
    sparse: bool = False
    across: Literal["always", "questions", ""] = ""
    """Whether the best of several runs is marked: `questions`, if they had the same held-out questions; never, if each
    run makes up the questions that it is measured by."""


def table(names: Iterable[str]) -> list[Row]:
    """Rows of the table of first, last and best values."""
    held_out = sorted(n for n in names if n.startswith("validation/pass@"))
    return [
        *(Row(f"held-out {n.removeprefix('validation/')}", n, "share", "more", True, "questions") for n in held_out),
        Row("answers right by the rule check", "selfplay/rule_score", "share"),
        Row("reward of answers", "selfplay/responder/reward", "number"),
        Row("reward of questions", "selfplay/questioner/reward", "number", "more"),
        Row("mixed groups among attempts", "selfplay/rate/mixed", "share", "more"),
        Row("remembered questions per attempt", "selfplay/history_depth", "number"),
        Row("votes with the majority", "selfplay/rate/agreeing_votes", "share"),
        Row("right by the verdict only", "selfplay/rate/right_by_verdict_only", "share"),
        Row("tokens of an answer", "selfplay/responder/response_tokens", "tokens"),
        Row("entropy", "train/entropy", "number"),
        Row("gradient norm", "train/grad_norm", "number"),
        Row("mismatch, mean |d|", "train/mismatch_abs", "number", "less", across="always"),
        Row("seconds per step", "time/step", "seconds", "less", across="always"),
        Row("tokens per second of the trainer", "train/tokens_per_second", "tokens", "more", across="always"),
        Row("tokens per second of the engines", "rollout/tokens_per_second", "tokens", "more", across="always"),
    ]
