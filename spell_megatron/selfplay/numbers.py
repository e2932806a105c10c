"""Numbers in short texts: the one number that a text states, and the number with which a text begins."""

from __future__ import annotations

import re
from decimal import Decimal

from spell_megatron.selfplay.arithmetic import Expression, expression_at
from spell_megatron.selfplay.characters import canonical
from spell_megatron.selfplay.latex import without_latex

# What is longer than this is no answer to a question.
MAX_LENGTH = 1000

WELL_FORMED = re.compile(r"-?(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)(?:\.[0-9]+)?")
"""A decimal number whose commas, if any, separate thousands."""
_DIGITS = re.compile(r"[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]+)?")

# What may stand before a number without changing it.
_FILLERS = (
    r"approximately|approx|about|around|roughly|nearly|almost|circa|ca|some|exactly|precisely|simply|just|only|"
    r"equal to|equals|therefore|thus|hence|then|indeed|actually|clearly|probably|likely|now|still|also|an estimated|"
    r"estimated|(?:an? |the )?(?:total|sum|value|number|amount|average|mean|ratio|difference) of"
)
_CURRENCIES = r"USD|US|EUR|GBP|RMB|CNY|JPY|INR|CHF|CAD|AUD|HKD|SGD|SEK|NOK|DKK|Rs"
_HEAD = re.compile(rf"(?:[\s~:,*`\"']|(?:{_FILLERS}|{_CURRENCIES})(?![A-Za-z])\.?|[A-Z]{{1,3}}(?=\$))*", re.IGNORECASE)
_SIGN_WORD = re.compile(r"(minus|negative|plus|positive)\s+", re.IGNORECASE)
_UNIT_BEFORE = re.compile(r"(?!(?:not|over|under|above|below|beyond|than|without)\b)[^\W\d_][^\s\d]*\s+", re.IGNORECASE)
# A text that begins so says something about numbers, but names not one.
_NOT_ONE = re.compile(
    r"(?:between|either|neither|less|more|fewer|greater|over|under|above|below|at (?:least|most)|up to|from|unknown|"
    r"unclear|undefined|undetermined|impossible|cannot|none|no longer|indeterminate|[<>≤≥±])(?![A-Za-z])",
    re.IGNORECASE,
)
_NO_VALUE = re.compile("[<>≤≥±]")
_SIDES = re.compile("=>|->|[=≈≅→]")
_TAIL = re.compile(
    r"(?!\s*(?:or (?:more|less|fewer|above|over|higher|greater|lower|below)|and (?:above|over|up|more))\b)"
    r"(?:\s*(?:[*'\",;]|\(s\)|/(?=\s*[^\W\d])|-(?=[^\W\d])|\^[23]|\.|[^\W\d_]|[$€£¥%‰°²³µ]))*\s*\??"
)
_REMARK = re.compile(r"\s*\([^()]*[^\W\d_][^()]*\)\s*$")
# After a number: what makes it a range, a list, a choice or a ratio.
_GOES_ON = re.compile(
    r"\s*(?:[^\W\d_]+\s+)?(?:(?:or|to|and|through|until|versus|vs\.?)\b|[-/:±]|\+/-)\s*"
    r"(?:about |approximately |nearly )?[-+]?[$€£¥]?\.?[0-9](?!\s*(?:decimal|significant))"
    r"|\s*(?:out )?of\s+[0-9]|\s+[0-9]"
    r"|(?:,\s+|;\s*)(?:(?:and|or) )?[-+]?[$€£¥]?[0-9][0-9.]*%?\s*(?:,|and\b|or\b|[.)]?\s*$)"
    r"|[^\s,;()]*[0-9]"
    r"|\s*or (?:more|less|fewer|above|over|higher|greater|lower|below)\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"[^=≈,;.!?\n]{1,60}(?:=>|[=≈])")
_EQUALS = re.compile(r"\s*[^\W\d_]{0,12}\s*(?:=>|->|[=≈≅→])")
_OR_AGAIN = re.compile(r"\s*[%a-z]{0,12},?\s*or\s+")
_SENTENCE = re.compile(r"(?:[^.!?\n]|[.!?](?![\s*\"')]|$))*")
_IN_PARENTHESES = re.compile(r"[$€£¥]?\s*\(\s*[$€£¥]?[^-+()]*[0-9][^-+()]*\)[^0-9]*")


def drop_thousands_separators(text: str) -> str:
    """Remove the commas of every number in which they separate thousands; leave other commas alone."""
    return _DIGITS.sub(lambda run: run[0].replace(",", "") if WELL_FORMED.fullmatch(run[0]) else run[0], text)


def parse_number(text: str) -> float | None:
    """The finite number that a short text states, or None if that is not exactly one.

    It is a numeral or arithmetic, in plain text or LaTeX, with its scale (3 million is 3000000). Signs of currency and
    percent, one word before and unit words after do not change it. Of `x = 7` the last side counts. Ranges, choices,
    ratios, dates and bounds are no number.
    """
    if len(text) > MAX_LENGTH:
        return None
    text = _SIDES.split(without_latex(canonical(text)))[-1].strip(" \t\n*`\"'").rstrip(". ")
    if _NO_VALUE.search(text):
        return None
    found = _number(text) or _number(text, _UNIT_BEFORE)
    if found is None or found.value is None:
        return None
    tail = _REMARK.sub("", text[found.end :])
    if not _TAIL.fullmatch(tail) or (found.operators and tail[:1].isalpha()):
        return None
    return found.value


def number_at(text: str) -> str | None:
    """The number with which a text begins, as it is written there, with its sign, currency and scale.

    Where the text goes on so that it states not one number (`5 or 6`, `10-12`, `less than 5`), all of it is returned,
    in which `parse_number` finds none. None if the text begins with something else.
    """
    text = without_latex(canonical(text[:MAX_LENGTH])).lstrip()
    line = _matched(_SENTENCE, text)
    head = _HEAD.match(line)
    if _NOT_ONE.match(line, head.end() if head else 0):
        return line.strip()
    start, found = _last_side(text)
    if found is None:
        return None
    end = start + found.end
    if _GOES_ON.match(text, end) and not _said_twice(found.value, text[end:]):
        return line.strip()
    return drop_thousands_separators(text[start + found.start : end]).rstrip(".,")


def _last_side(text: str) -> tuple[int, Expression | None]:
    """The number behind the last sign of equality in what a text begins with, and where that side begins."""
    name = _NAME.match(text)
    start, found = 0, _number(text)
    if found is None and name:
        start = name.end()
        found = _number(text[start:])
    while found and (sign := _EQUALS.match(text, start + found.end)):
        side = _number(text[sign.end() :])
        if side is None:
            break
        start, found = sign.end(), side
    return start, found


def _said_twice(value: float | None, rest: str) -> bool:
    """Whether a text goes on with the same number in another form: 0.5 or 50 %."""
    again = _OR_AGAIN.match(rest)
    other = _number(rest[again.end() :]) if again else None
    if again is None or value is None or other is None or other.value is None:
        return False
    percent = "%" in again[0], rest[again.end() + other.end :].lstrip().startswith("%")
    scale = {(False, True): 100.0, (True, False): 0.01}.get(percent, 1.0)
    return abs(other.value - value * scale) <= 1e-3 * abs(other.value)


_UNITS = re.compile(r"[%‰°*`$€£¥)\]]*(?:\s+[^\W\d_/]+){0,3}\s*[.*`$]*")


def number_alone(text: str) -> str | None:
    """The number that stands alone in the last or first line of a text, perhaps with a unit."""
    text = text.strip()
    for line in (text.rpartition("\n")[2], text.partition("\n")[0]):
        side = _SIDES.split(without_latex(canonical(line[:MAX_LENGTH])))[-1].strip()
        found = _number(side)
        alone = found and found.value is not None and _UNITS.fullmatch(side[found.end :].removeprefix("."))
        if alone and not re.match(r"[0-9]+\.\s", side):
            return number_at(side)
    return None


def in_parentheses(text: str) -> bool:
    """Whether a text is an unsigned number in parentheses, as accountants write a negative one."""
    return bool(_IN_PARENTHESES.fullmatch(without_latex(canonical(text[:MAX_LENGTH])).strip(" .*`$")))


def _matched(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.match(text)
    return found[0] if found else ""


def _number(text: str, before: re.Pattern[str] | None = None) -> Expression | None:
    """The expression with which a text begins, after fillers and perhaps a word before; places are those in `text`."""
    head = _HEAD.match(text)
    start = head.end() if head else 0
    if before is not None:
        word = before.match(text, start)
        start = word.end() if word else start
    sign = _SIGN_WORD.match(text, start)
    found = expression_at(text[sign.end() if sign else start :])
    if found is None:
        return None
    offset = sign.end() if sign else start
    value = found.value
    if sign and value is not None and sign[1].lower() in ("minus", "negative"):
        value = -value
    begin = start if sign else _with_currency(text, offset + found.start, start)
    return Expression(value, begin, offset + found.end, found.operators)


def _with_currency(text: str, start: int, limit: int) -> int:
    """Where the number begins that stands at `start`, with a sign of currency before it."""
    while start > limit and text[start - 1] in "$€£¥":
        start -= 1
    return start


def format_decimal(value: float) -> str:
    """A finite number in decimals, never in scientific notation: 1200.0 -> 1200, 1e-05 -> 0.00001."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")
