"""Numbers: reading, comparing and scoring them.

Decided: arithmetic only, nothing is executed; what is no finite number (also yes and no, option letters,
lists, choices) matches nothing; signs count; scientific notation is read and never written; commas go only
where they separate thousands; leading zeros are ignored; ^ is a power; words of scale multiply. The number stated last
counts, with its sign and without words before it; one in parentheses keeps them, as it can be negative. Numbers match
within 0.15 % or by a forgiven factor, which 100 is only for what can be a ratio, and not because they round alike.
"""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction
from typing import Any

from spell_megatron.selfplay import numbers, parsing, scoring
from vectors.answers import decide_region
from vectors.functions import NUMBER, compute_score, function

UNPARSABLE = 999999999  # what the reference makes of text that it cannot evaluate
MARKS = "£€¥`%$°"


def arithmetic(text: str) -> float | None:
    """Value of the text as Python arithmetic on real numbers. SyntaxError if it is no Python at all."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            match node.op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.Pow():
                    return math.pow(a, b)
        raise ValueError("not arithmetic")

    if re.search("[0-9][xXoObB_]", text):
        return None
    text = re.sub(r"(?<![\w.])0+(?=[0-9])", "", text.replace("^", "**"))
    tree = ast.parse(text.strip(), mode="eval")
    try:
        result = value(tree)
    except (ValueError, ArithmeticError):
        return None
    return result if math.isfinite(result) else None


def bare(text: str) -> str:
    """The text without what surrounds a number."""
    text = re.split("[=≈]", text)[-1]
    for mark in (*MARKS, "approximately", "about", "USD", "US", "RMB"):
        text = text.replace(mark, "")
    for word, scale in {"million": "e6", "billion": "e9", "thousand": "e3"}.items():
        text = text.replace(f" {word}", scale)
    text = text.replace(" x ", "*").replace("×", "*").replace("÷", "/").replace("−", "-")
    text = " ".join(text.split()).rstrip(". ")
    return text.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text) else text


def unit_removed(text: str) -> str | None:
    """The number of a text that is one number and one unit."""
    number = r"([-+]?[0-9.,]*[0-9])"
    found = re.fullmatch(rf"{number}(?: [^0-9 ]+|[^0-9]{{1,2}})", text) or re.fullmatch(
        rf"(?:[^-+0-9 ][^0-9 ]* |[^-+0-9]{{1,2}}){number}", text
    )
    return found and found[1]


def is_code(text: str) -> bool:
    """Whether the reference's evaluation can give a value that arithmetic does not."""
    text = bare(text)
    try:
        node = ast.parse(text.replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return not isinstance(node, ast.Name) and arithmetic_or_none(text) is None and not unit_removed(text)


def arithmetic_or_none(text: str) -> float | None:
    try:
        return arithmetic(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def decided_number(text: str) -> float | None:
    text = bare(text)
    value = arithmetic_or_none(text)
    if value is None and not is_code(text) and (number := unit_removed(text)):
        value = arithmetic_or_none(bare(number))
    return value


def is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decide_number(input: dict, expected: Any) -> Any:
    text = input["text"]
    if " or " in text:
        return UNPARSABLE
    if re.search("million|billion|thousand", text):
        return decided_number(text)
    if is_real(expected) and expected != UNPARSABLE and not is_code(text) and not re.search(r"(?<!10)\^", text):
        return expected
    value = decided_number(text)
    return UNPARSABLE if value is None else value


def decide_match(prediction: str | None, reference: str | None, expected: Any) -> int:
    """Score of two texts with numbers, given the score of the reference."""
    if prediction is None or reference is None:
        return 0
    a, b = decided_number(prediction), decided_number(reference)
    if a is None or b is None or a * b < 0:
        return 0
    if isinstance(expected, dict) or is_code(prediction) or is_code(reference):
        return int(numbers_agree(a, b))
    return expected


def numbers_agree(a: float, b: float) -> bool:
    """The comparison, in exact fractions."""
    p, gt = Fraction(a), Fraction(b)
    large, small, tolerance = max(abs(p), abs(gt)), min(abs(p), abs(gt)), Fraction("0.0015")
    forgiven = [10**3, 10**6, 10**9] + [100] * (small < 10)
    if any(small <= 2 * large / s and abs(small * s - large) <= tolerance * large for s in forgiven):
        return p * gt >= 0
    return abs(p - gt) <= tolerance * abs(gt)


def without_separators(text: str) -> str:
    """The text without those commas that separate thousands."""

    def plain(run: re.Match[str]) -> str:
        first, *groups = run[0].partition(".")[0].split(",")
        separated = len(first) <= 3 and first[0] != "0" and all(len(group) == 3 for group in groups)
        return run[0].replace(",", "") if separated else run[0]

    return re.sub(r"[0-9]+(,[0-9]+)+(\.[0-9]+)?", plain, text)


def as_written(text: str | None, extracted: str | None) -> str | None:
    """The number that a text states last, as it has it: sign, currency, exponent, parentheses, odd commas too."""
    if text is None:
        return None
    text = text.replace("*", "").rpartition("</think>")[2]
    number = r"-?[£€¥$]?[0-9.,]*[0-9](?:e[-+]?[0-9]+)?"
    box = r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"
    phrase = rf"answer is (?:about |approximately |≈)?({number}(?: or {number})?|\({number}\))"
    stated = f"{box}|{phrase}"
    found = re.findall(stated, text, re.IGNORECASE)
    return without_separators(found[-1][0] or found[-1][1]) if found else None


def number_or_nothing(value: Any) -> float | None:
    return float(value) if is_real(value) else None


@function("docmath.normalize", decide_number)
def _(input: dict) -> Any:
    value = numbers.parse_number(input["text"])
    return UNPARSABLE if value is None else value


@function("docmath.is_number")
def _(input: dict) -> Any:
    return bool(numbers.WELL_FORMED.fullmatch(input["text"]))


@function("docmath.parse_model_answer", lambda input, expected: as_written(input["text"], expected))
def _(input: dict) -> Any:
    return None if input["text"] is None else parsing.extract_answer(NUMBER, input["text"])


@function("docmath.extract_solution", decide_region)
def _(input: dict) -> Any:
    region = parsing.after_thinking(input["text"])
    return "Empty" if region is None else region


@function("docmath.within_eps")
def _(input: dict) -> Any:
    return scoring.within_tolerance(input["pred"], input["gt"])


def decide_comparison(input: dict, expected: Any) -> Any:
    return is_real(input["pred"]) and is_real(input["gt"]) and numbers_agree(input["pred"], input["gt"])


@function("docmath.compare_two_numbers", decide_comparison)
def _(input: dict) -> Any:
    # Our comparison takes what our parser gives: numbers.
    prediction, reference = number_or_nothing(input["pred"]), number_or_nothing(input["gt"])
    return prediction is not None and reference is not None and scoring.numbers_match(prediction, reference)


@function("docmath.get_acc", lambda input, expected: decide_match(input["prediction"], input["gt"], expected))
def _(input: dict) -> Any:
    return scoring.rule_score(NUMBER, input["prediction"], input["gt"])


def decide_number_score(input: dict, expected: dict) -> dict:
    prediction = as_written(input["response"], expected["pred"])
    reference = as_written(input["ground_truth"], expected["gt"])
    if "answer is" not in input["ground_truth"]:
        reference = input["ground_truth"]
    same = (prediction, reference) == (expected["pred"], expected["gt"])
    score = decide_match(prediction, reference, expected["score"] if same else {})
    return {**expected, "score": score, "pred": prediction, "gt": reference}


@function("docmath.compute_score", decide_number_score, ignored=["weight"])
def _(input: dict) -> Any:
    return compute_score(NUMBER, input)
