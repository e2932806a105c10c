"""Reference answers: what can be one, and those that people give in files of questions and in benchmarks."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from spell_megatron.selfplay.letters import letter_at
from spell_megatron.selfplay.numbers import format_decimal, parse_number
from spell_megatron.selfplay.texts import normalize_text

# A reference, in the form of `normalize_text`, that says that there is none.
_TEXTS = r"(?:documents?|texts?|passages?|articles?|sources?|context)"
_SUBJECT = r"(?:(?:it|this|that|answer|information|which|data) (?:(?:is|was) )?)?"
_ABSENT = (
    r"unknown|unspecified|undetermined|unclear|unanswerable|undefined|undisclosed|n a|na|none|null|nil|tbd",
    r"not applicable",
    r"not (?:\w+ )?(?:mentioned|specified|stated|given|provided|available|known|clear|determined|disclosed|found|"
    r"reported|included|discussed|indicated|enough info(?:rmation)?|possible to (?:say|tell|determine))",
    rf"(?:not in|none of) (?:these |given |provided )?{_TEXTS}(?: .*)?",
    r"(?:cannot|can not|cant|could not|couldnt) be (?:determined|answered|inferred|found|known|established)",
    r"(?:there (?:is|are) )?(?:no|insufficient|not enough) (?:answer|info(?:rmation)?|data|evidence|mention|details?)",
    rf"{_TEXTS} (?:(?:do|does) not|doesnt|dont)|i (?:do not|dont) know",
)
_WHERE = (
    r"(?: (?:is|was|can|not|in|from|by|based|according|to|about|on|for|within|without|available|given|provided|state|"
    r"say|mention|specify|contain|information)\b.*)?"
)
_EMPTY = ("the", "an", "answer", "your answer", "insert answer here")
_NO_ANSWER = re.compile(f"{_SUBJECT}(?:{'|'.join(_ABSENT)}){_WHERE}")


def says_something(reference: str) -> bool:
    """Whether a text says something that an answer can match, and not that there is no answer."""
    said = normalize_text(reference)
    return bool(said) and said not in _EMPTY and not _NO_ANSWER.fullmatch(said)


def known_answer(task: str, value: object) -> str:
    """The answer to a question in a file, as the rule check of its task takes it.

    Raises:
        ValueError: saying what the answer must be.
    """
    answer = answer_text(value)
    if not answer:
        raise ValueError(f"answer must be a text or a number, not {shown(value)}")
    if task == "doc_mc":
        letter = letter_at(answer)
        if not letter:
            raise ValueError(f"answer of doc_mc must be A, B, C or D, not {shown(answer)}")
        return letter
    if task == "docmath_qa" and parse_number(answer) is None:
        raise ValueError(f"answer of docmath_qa must be a number, not {shown(answer)}")
    return answer


def answer_text(value: object) -> str:
    """A reference answer as text, numbers in decimals; "" for what is neither text nor number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return format_decimal(value)
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value.normalize():f}"
    return valid_unicode(value).strip() if isinstance(value, str) else ""


def valid_unicode(text: str) -> str:
    """A text with a question mark for each half of a surrogate pair: JSON can hold such, tokenizers refuse them."""
    return text.encode("utf-8", "replace").decode()


def shown(value: object) -> str:
    """A value as a message shows it: at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
