"""Arithmetic as people write it: numerals, + - × ÷ ^, fractions, parentheses, words of scale. Nothing is executed."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from decimal import Decimal
from typing import NamedTuple

MAX_DEPTH = 50

# Every run of digits with its separators, right or wrong: half of a wrong numeral is no number.
_RUN = re.compile(
    r"(?:[0-9]{1,3}(?: [0-9]{3})+(?![0-9])(?:[.,][0-9]+)?|[0-9]+(?:[.,'][0-9]+)*\.?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]))?"
)
_PLAIN = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_GROUPED = re.compile(r"[1-9][0-9]{0,2}([,' ])[0-9]{3}(?:\1[0-9]{3})*(?:\.[0-9]+)?")
_POINT_AND_COMMA = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3},[0-9]+")
_EXPONENT = re.compile(r"[eE](?=[-+]?[0-9]+$)")

SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "lakh": 10**5,
    "crore": 10**7,
    "mn": 10**6,
    "bn": 10**9,
    "千": 10**3,
    "万": 10**4,
    "萬": 10**4,
    "亿": 10**8,
    "億": 10**8,
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
}
_SCALE = re.compile(
    r"\s*(hundred|thousand|million|billion|trillion|dozen|lakh|crore|mn|bn)s?\b|\s*([千万萬亿億])", re.I
)
# One letter is a scale where it is written like one: 5k, 5M, $5m; 5 m are metres.
_SCALE_LETTER = re.compile(r"([kKMB])\b|(?<=[0-9])m\b")
_OPERATOR = re.compile(r"\*\*|[-+*/^()×÷·]|\\frac\b|(?<=[0-9) ])[xX](?=\s*10\^)|(?<= )[xX](?= [0-9(.])")
_IGNORED = re.compile(r"[\s$€£¥₹₩₽%‰°`]*")
_SAME_OPERATORS = {"×": "*", "·": "*", "÷": "/", "x": "*", "X": "*", "**": "^"}


class Token(NamedTuple):
    """A numeral, an operator or a scale, with where it stands. `value`: of numerals (None: wrong) and scales."""

    kind: str
    start: int
    end: int
    value: Decimal | None = None


class Expression(NamedTuple):
    """The arithmetic with which a text begins: its value (None: it has none), and where it begins and ends."""

    value: float | None
    start: int
    end: int
    operators: bool


def expression_at(text: str) -> Expression | None:
    """The arithmetic expression with which a text begins; None if it does not begin with one.

    `text` is canonical. Braces and brackets are parentheses. Signs of currency and percent do not count.
    """
    tokens = _tokens(text.translate(_PARENTHESES))
    while tokens and tokens[-1].kind not in ("number", "scale", ")"):
        tokens.pop()
    if not any(token.kind == "number" for token in tokens):
        return None
    value: float | None = None
    used = len(tokens)
    with suppress(ValueError, ArithmeticError):
        value, used = _sum(tokens, 0, 0)
    tokens = tokens[:used]
    if _is_range(tokens, text) or value is None or not math.isfinite(value):
        value = None
    operators = sum(token.kind in "+-*/^" for token in tokens[1:]) > 0
    return Expression(value, tokens[0].start, tokens[-1].end, operators)


_PARENTHESES = str.maketrans("{}[]", "()()")


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = _skip(text, 0)
    while position < len(text):
        if run := _RUN.match(text, position):
            tokens.append(Token("number", run.start(), run.end(), numeral(run[0])))
        elif operator := _OPERATOR.match(text, position):
            tokens.append(Token(_SAME_OPERATORS.get(operator[0], operator[0]), operator.start(), operator.end()))
        else:
            break
        position = _scales(text, tokens)
        position = _skip(text, position)
    return tokens


def _skip(text: str, position: int) -> int:
    ignored = _IGNORED.match(text, position)
    return ignored.end() if ignored else position


def _scales(text: str, tokens: list[Token]) -> int:
    """Append the scales that follow the last token, if that is a number or closes parentheses; where they end."""
    position = tokens[-1].end
    if tokens[-1].kind not in ("number", ")"):
        return position
    letter = _SCALE_LETTER.match(text, position)
    if letter and (letter[1] or "$" in text[:position] or "€" in text[:position] or "£" in text[:position]):
        tokens.append(Token("scale", position, letter.end(), Decimal(SCALES[letter[0].lower()])))
        return letter.end()
    while scale := _SCALE.match(text, position):
        tokens.append(Token("scale", position, scale.end(), Decimal(SCALES[(scale[1] or scale[2]).lower()])))
        position = scale.end()
    return position


def numeral(run: str) -> Decimal | None:
    """The value of a numeral; None if its separators are not where a reader expects them.

    Commas, apostrophes and blanks separate thousands. A comma is a decimal comma only after a point for thousands:
    1,5 can mean two things.
    """
    mantissa, *exponent = _EXPONENT.split(run)
    if _GROUPED.fullmatch(mantissa):
        mantissa = re.sub("[,' ]", "", mantissa)
    elif _POINT_AND_COMMA.fullmatch(mantissa):
        mantissa = mantissa.replace(".", "").replace(",", ".")
    elif not _PLAIN.fullmatch(mantissa):
        return None
    if exponent and len(exponent[0]) > 5:
        return None
    return Decimal(f"{mantissa}e{exponent[0]}" if exponent else mantissa)


def _is_range(tokens: list[Token], text: str) -> bool:
    """Whether the tokens are a range, a date or the like: bare numbers joined by hyphens, or three joined by slashes.

    With blanks around the hyphens, they are a difference if the first number is the largest.
    """
    if any(token.kind not in ("number", "-", "/") for token in tokens) or not tokens or len(tokens) % 2 == 0:
        return False
    numbers, joints = tokens[::2], tokens[1::2]
    kinds = {token.kind for token in joints}
    if len(kinds) != 1 or any(token.kind != "number" for token in numbers):
        return False
    spaced = all(text[joint.start - 1].isspace() and text[joint.end : joint.end + 1].isspace() for joint in joints)
    if kinds == {"/"}:
        return len(joints) > 1 and not spaced
    values = [token.value for token in numbers if token.value is not None]
    return not spaced or not values or values[0] <= max(values[1:], default=values[0])


# Grammar: sum = product {(+|-) product}, product = signed {(*|/) signed}, signed = {+|-} power,
# power = scaled [^ signed], scaled = atom {scale}, atom = number [number / number] | ( sum ) | frac atom atom. Each
# function takes the tokens, where it starts and the depth of nesting, and returns the value and where it ended.


def _kind(tokens: list[Token], position: int) -> str:
    return tokens[position].kind if position < len(tokens) else ""


def _sum(tokens: list[Token], position: int, depth: int) -> tuple[float, int]:
    value, position = _product(tokens, position, depth)
    while (operator := _kind(tokens, position)) in ("+", "-"):
        term, position = _product(tokens, position + 1, depth)
        value += -term if operator == "-" else term
    return value, position


def _product(tokens: list[Token], position: int, depth: int) -> tuple[float, int]:
    value, position = _signed(tokens, position, depth)
    while (operator := _kind(tokens, position)) in ("*", "/"):
        factor, position = _signed(tokens, position + 1, depth)
        value = value / factor if operator == "/" else value * factor
    return value, position


def _signed(tokens: list[Token], position: int, depth: int) -> tuple[float, int]:
    sign = 1
    while (operator := _kind(tokens, position)) in ("+", "-"):
        sign = -sign if operator == "-" else sign
        position += 1
    value, position = _scaled(tokens, position, depth)
    if _kind(tokens, position) == "^":
        exponent, position = _signed(tokens, position + 1, depth + 1)
        value = math.pow(value, exponent)
    return sign * value, position


def _scaled(tokens: list[Token], position: int, depth: int) -> tuple[float, int]:
    """An atom with its scales. Of a bare numeral the product is exact: 4.35 million is 4350000."""
    start = position
    value, position = _atom(tokens, position, depth)
    exact = tokens[start].value if position == start + 1 else None
    while _kind(tokens, position) == "scale":
        scale = tokens[position].value or Decimal(1)
        exact = None if exact is None else exact * scale
        value = value * int(scale) if exact is None else float(exact)
        position += 1
    return value, position


def _atom(tokens: list[Token], position: int, depth: int) -> tuple[float, int]:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    kind = _kind(tokens, position)
    if kind == "(":
        value, position = _sum(tokens, position + 1, depth + 1)
        if _kind(tokens, position) != ")":
            raise ValueError("unbalanced parentheses")
        return value, position + 1
    if kind == r"\frac":
        above, position = _atom(tokens, position + 1, depth + 1)
        below, position = _atom(tokens, position, depth + 1)
        return above / below, position
    number = tokens[position].value if kind == "number" else None
    if number is None:
        raise ValueError("no number")
    whole = float(number)
    parts = tokens[position : position + 4]
    if [part.kind for part in parts] == ["number", "/", "number", "scale"] and parts[0].end == parts[2].start - 1:
        return whole / float(parts[2].value or 0), position + 3  # 3/4 million
    return _mixed(whole, tokens, position + 1, depth)


def _mixed(whole: float, tokens: list[Token], position: int, depth: int) -> tuple[float, int]:
    """A number, and the fraction that may follow it: 1 1/2, or 1 and a LaTeX fraction."""
    if _kind(tokens, position) == r"\frac":
        fraction, position = _atom(tokens, position, depth + 1)
        return whole + fraction, position
    pair = tokens[position : position + 3]
    if [token.kind for token in pair] == ["number", "/", "number"] and whole.is_integer():
        above, below = pair[0].value, pair[2].value
        if above is not None and below is not None and 0 < above < below:
            return whole + float(above) / float(below), position + 3
    return whole, position
