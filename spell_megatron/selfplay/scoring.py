"""Rule checks: does a prediction match a reference?

Three kinds of answers have one check each: numbers (0.15 % tolerance, slips of scale forgiven),
text (cover exact match) and option letters. Everything here is pure, total and linear in the length
of its input; model text is never executed.
"""

from __future__ import annotations

from typing import Literal

from spell_megatron.selfplay.numbers import in_parentheses, parse_number
from spell_megatron.selfplay.texts import cover_exact_match

AnswerKind = Literal["number", "text", "letter"]

RELATIVE_TOLERANCE = 0.0015
# Thousands, millions or billions for units.
SCALES = (1e3, 1e6, 1e9)
# Percent for a fraction or a ratio; a ratio this large is not given in percent, so 2000 is not 20.
PERCENT, LARGEST_RATIO = 100.0, 10.0


def answer_kind(task: str) -> AnswerKind:
    """Kind of answers of a task, a benchmark or a data source, by its name.

    Raises:
        ValueError: for a name that belongs to no kind.
    """
    if any(name in task for name in ("longbench_v2", "longbench-v2", "doc_mc")):
        return "letter"
    if any(name in task for name in ("general_qa", "frames", "musique", "longbench")):
        return "text"
    if "docmath" in task:
        return "number"
    raise ValueError(f"no rule check is known for the task {task!r}")


def rule_score(task: str, prediction: str | None, reference: str) -> int:
    """1 if the prediction matches the reference under the task's rule check, else 0.

    `prediction` is what `parsing.parse_answer` found (None: no answer, scores 0); `reference` is
    bare, without a phrase around it.
    """
    if prediction is None:
        return 0
    kind = answer_kind(task)
    if kind == "letter":
        return int(prediction == reference)
    if kind == "text":
        return int(cover_exact_match(prediction, reference))
    return int(any(numbers_match(p, r) for p in _values(prediction) for r in _values(reference)))


def _values(text: str) -> list[float]:
    """The numbers that a text can mean: none, one, or of a number in parentheses the negative one too."""
    value = parse_number(text)
    if value is None:
        return []
    return [value, -value] if in_parentheses(text) else [value]


# Numbers


def within_tolerance(prediction: float, reference: float) -> bool:
    """Whether the prediction is within 0.15 % of the reference."""
    margin = RELATIVE_TOLERANCE * abs(reference)
    return reference - margin <= prediction <= reference + margin


def numbers_match(prediction: float, reference: float) -> bool:
    """Whether two numbers have the same sign, and magnitudes that agree in one of two ways.

    They lie within 0.15 %, or one is the other times 1e3, 1e6 or 1e9 within 0.15 %, or times 100 if the other is below
    10.
    """
    if prediction * reference < 0 or (prediction < 0) != (reference < 0):
        return False
    small, large = sorted((abs(prediction), abs(reference)))
    scales = (PERCENT, *SCALES) if small < LARGEST_RATIO else SCALES
    if any(small <= 2 * large / s and abs(small * s - large) <= RELATIVE_TOLERANCE * large for s in scales):
        return True
    return within_tolerance(prediction, reference)
