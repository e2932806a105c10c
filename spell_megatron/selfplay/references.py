"""Reference answers that people give, in files of questions and in benchmarks."""

from __future__ import annotations

import math

from spell_megatron.selfplay.parsing import LETTERS, format_decimal
from spell_megatron.selfplay.scoring import parse_number


def known_answer(task: str, value: object) -> str:
    """The answer to a question in a file, as the rule check of its task takes it.

    Raises:
        ValueError: saying what the answer must be.
    """
    answer = answer_text(value)
    if not answer:
        raise ValueError(f"answer must be a text or a number, not {shown(value)}")
    if task == "doc_mc" and answer not in tuple(LETTERS):
        raise ValueError(f"answer of doc_mc must be A, B, C or D, not {shown(answer)}")
    if task == "docmath_qa" and parse_number(answer) is None:
        raise ValueError(f"answer of docmath_qa must be a number, not {shown(answer)}")
    return answer


def answer_text(value: object) -> str:
    """A reference answer as text, numbers in decimals; "" for what is neither text nor number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return format_decimal(value)
    return valid_unicode(value).strip() if isinstance(value, str) else ""


def valid_unicode(text: str) -> str:
    """A text with a question mark for each half of a surrogate pair: JSON can hold such, tokenizers refuse them."""
    return text.encode("utf-8", "replace").decode()


def shown(value: object) -> str:
    """A value as a message shows it: at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
