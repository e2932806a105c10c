"""Rule checks: does a prediction match a reference?

Three kinds of answers have one check each: numbers (0.15 % tolerance, slips of scale forgiven),
text (cover exact match) and option letters. Everything here is pure, total and linear in the length
of its input; model text is never executed.
"""

from __future__ import annotations

import math
import re
import string
from typing import Literal

AnswerKind = Literal["number", "text", "letter"]

RELATIVE_TOLERANCE = 0.0015
# Percent for fraction, and thousands, millions or billions for units.
SCALES = (1e2, 1e3, 1e6, 1e9)
# What is longer or deeper than this is no answer to a question.
MAX_EXPRESSION_LENGTH = 1000
MAX_EXPRESSION_DEPTH = 50


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
    predicted, expected = parse_number(prediction), parse_number(reference)
    return int(predicted is not None and expected is not None and numbers_match(predicted, expected))


# Text


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_text(text: str) -> str:
    """Lower case without ASCII punctuation and articles; every run of whitespace is one blank."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def cover_exact_match(prediction: str, reference: str) -> bool:
    """Whether the normalised reference occurs in the normalised prediction (as characters).

    A reference of which normalisation leaves nothing matches nothing.
    """
    expected = normalize_text(reference)
    return bool(expected) and expected in normalize_text(prediction)


# Numbers


WELL_FORMED = re.compile(r"-?(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)(?:\.[0-9]+)?")
"""A decimal number whose commas, if any, separate thousands."""

_DELETED = re.compile(r"million|billion|thousand|approximately|USD|US|RMB|[£€¥`%$°]")
_NUMBER = r"[-+]?[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?"
_QUANTITY = re.compile(
    rf"(?P<plain>{_NUMBER})"
    rf"|(?P<unit_after>{_NUMBER})(?: [^0-9 ]+|[^0-9]{{1,2}})"
    rf"|(?:[^-+0-9 ][^0-9 ]* |[^-+.0-9]{{1,2}})(?P<unit_before>{_NUMBER})"
)
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)|(\*\*|[-+*/^()]))")
_DIGITS = re.compile(r"[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?")
_OPERATORS = str.maketrans({"−": "-", "×": "*", "·": "*", "÷": "/"})


def drop_thousands_separators(text: str) -> str:
    """Remove the commas of every number in which they separate thousands; leave other commas alone."""
    return _DIGITS.sub(lambda run: run[0].replace(",", "") if WELL_FORMED.fullmatch(run[0]) else run[0], text)


def parse_number(text: str) -> float | None:
    """The finite number that a short text states, or None.

    Currency and percent signs, scale words and one unit are dropped without changing the value (the
    comparison forgives such slips); of `x = 7` the last side counts, of `5 or 6` the first. What is
    left must be a number or an expression of numbers, + - × ÷ ^ and parentheses.
    """
    text = text[: MAX_EXPRESSION_LENGTH + 1].translate(_OPERATORS)
    if len(text) > MAX_EXPRESSION_LENGTH:
        return None
    text = re.split("[=≈]", text)[-1]
    text = _DELETED.sub("", text.partition(" or ")[0])
    text = " ".join(text.replace(" x ", " * ").split()).rstrip(". ")
    quantity = _QUANTITY.fullmatch(text)
    value: float | None
    if quantity:
        number = drop_thousands_separators(quantity["plain"] or quantity["unit_after"] or quantity["unit_before"])
        if "," in number:
            return None
        value = float(number)
    else:
        value = _evaluate(text)
    return value if value is not None and math.isfinite(value) else None


def _evaluate(text: str) -> float | None:
    """Value of an arithmetic expression in floating point, so that no power takes long."""
    tokens: list[str] = []
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if not token:
            return None
        tokens.append(token[1] or token[2])
        position = token.end()
    try:
        value, end = _sum(tokens, 0, 0)
    except (ValueError, ArithmeticError):
        return None
    return value if end == len(tokens) else None


# Grammar: sum = product {(+|-) product}, product = signed {(*|/) signed}, signed = {+|-} power,
# power = atom [^ signed], atom = number | ( sum ). Each function takes the tokens, where it starts and the
# depth of nesting, and returns the value and where it ended.


def _sum(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    value, position = _product(tokens, position, depth)
    while tokens[position : position + 1] in (["+"], ["-"]):
        sign = 1 if tokens[position] == "+" else -1
        term, position = _product(tokens, position + 1, depth)
        value += sign * term
    return value, position


def _product(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    value, position = _signed(tokens, position, depth)
    while tokens[position : position + 1] in (["*"], ["/"]):
        divide = tokens[position] == "/"
        factor, position = _signed(tokens, position + 1, depth)
        value = value / factor if divide else value * factor
    return value, position


def _signed(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    sign = 1
    while tokens[position : position + 1] in (["+"], ["-"]):
        sign = -sign if tokens[position] == "-" else sign
        position += 1
    value, position = _atom(tokens, position, depth)
    if tokens[position : position + 1] in (["^"], ["**"]):
        exponent, position = _signed(tokens, position + 1, depth + 1)
        value = math.pow(value, exponent)
    return sign * value, position


def _atom(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    if position == len(tokens) or depth > MAX_EXPRESSION_DEPTH:
        raise ValueError("expression too short or too deep")
    if tokens[position] == "(":
        value, position = _sum(tokens, position + 1, depth + 1)
        if tokens[position : position + 1] != [")"]:
            raise ValueError("unbalanced parentheses")
        return value, position + 1
    return float(tokens[position]), position + 1


def within_tolerance(prediction: float, reference: float) -> bool:
    """Whether the prediction is within 0.15 % of the reference."""
    margin = RELATIVE_TOLERANCE * abs(reference)
    return reference - margin <= prediction <= reference + margin


def numbers_match(prediction: float, reference: float) -> bool:
    """Whether two numbers agree: same sign, and magnitudes that agree in one of three ways.

    They lie within 0.15 %; or they are equal when rounded up to three decimals; or one is the
    other times 100, 1e3, 1e6 or 1e9 within 0.15 %.
    """
    if prediction * reference < 0 or (prediction < 0) != (reference < 0):
        return False
    small, large = sorted((abs(prediction), abs(reference)))
    if any(small <= 2 * large / s and abs(small * s - large) <= RELATIVE_TOLERANCE * large for s in SCALES):
        return True
    if math.isfinite(1000 * large) and math.ceil(1000 * small) == math.ceil(1000 * large):
        return True
    return within_tolerance(prediction, reference)
