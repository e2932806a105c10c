"""From model text to typed outcomes: a question, an answer, a verdict, or the reason there is none.

All functions are total: no text makes them raise, and each takes time linear in its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.scoring import answer_kind, drop_thousands_separators, parse_number

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A question with its reference answer.

    `text` is what responder and verifier are shown. For multiple choice it is made of `stem` and the
    four `options`, and `reference` is a letter.
    """

    task: str
    text: str
    reference: str
    stem: str = ""
    options: tuple[str, ...] = ()

    def permuted(self, order: Sequence[int]) -> Question:
        """The multiple-choice question with option `order[i]` at place i; the reference moves along.

        Raises:
            ValueError: if the question has no options or `order` does not name each of them once.
        """
        if not self.options or sorted(order) != list(range(len(self.options))):
            raise ValueError(f"{order} is no order of {len(self.options)} options")
        options = tuple(self.options[i] for i in order)
        reference = LETTERS[list(order).index(LETTERS.index(self.reference))]
        return replace(self, text=choice_text(self.stem, options), reference=reference, options=options)


# Regions of a text


def after_thinking(text: str) -> str | None:
    """What follows the last `</think>` (all of it without one), stripped; None if thinking never ends."""
    if "<think>" in text and "</think>" not in text:
        return None
    return text.rpartition("</think>")[2].strip()


def answer_region(task: str, text: str) -> str | None:
    """The part of a response in which its answer may stand; None if thinking never ends.

    Without an answer phrase or the end of thinking, only the end of the response counts: 300
    characters, or 1,000 for text answers.
    """
    kind = answer_kind(task)
    marked = "</think>" in text or "answer is" in text or (kind == "number" and r"\boxed{" in text)
    region = after_thinking(text)
    if region is None or marked:
        return region
    return region[-1000:] if kind == "text" else region[-300:]


# Answers


_TEXT_PHRASES = ("the answer is", "correct answer is", "answer is")
_TEXT_DELETED = re.compile(r"\*|<｜Assistant｜>|<｜end▁of▁sentence｜>")
_STATED_NUMBER = r"=?≈?`?%?\$?°?£?€?¥?-?[0-9.,]*[0-9][0-9.,]*(?:[eE][-+]?[0-9]+)?"
_NUMBER_PHRASES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"the answer is \(({_STATED_NUMBER})\)",
        rf"the answer is ({_STATED_NUMBER})",
        rf"answer is \(({_STATED_NUMBER})\)",
        rf"answer is ({_STATED_NUMBER})",
    )
]
_LETTER_PHRASES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\\boxed\{([A-D])\}",
        r"correct answer is \(([A-D])\)",
        r"correct answer is ([A-D])",
        r"answer is \(([A-D])\)",
        r"answer is ([A-D])",
    )
]


def parse_answer(task: str, text: str, truncated: bool) -> str | None:
    """The answer that a response states, in the form `scoring.rule_score` takes; None if there is none.

    `truncated`: the engine stopped at the length limit, so whatever stands there is no final answer.
    """
    region = None if truncated else answer_region(task, text)
    return None if region is None else extract_answer(task, region) or None


def extract_answer(task: str, text: str) -> str | None:
    """What follows an answer phrase (or stands in a box), by the kind of answers of the task."""
    return {"number": _extract_number, "text": _extract_text, "letter": _extract_letter}[answer_kind(task)](text)


def _extract_text(text: str) -> str | None:
    """The line after the last use of the first phrase that occurs, without full stops around it."""
    text = _TEXT_DELETED.sub("", text)
    phrase = next((phrase for phrase in _TEXT_PHRASES if phrase in text), None)
    if phrase is None:
        return None
    answer = text.rpartition(phrase)[2].strip(". \t\r\n")
    if "insert answer here" in answer:
        return None
    return answer.partition("\n")[0].strip(". \t\r")


def _extract_number(text: str) -> str | None:
    """The content of the last box, or the number after the last use of the first phrase that has one."""
    text = text.replace("*", "")
    if r"\boxed{" in text:
        answer = _balanced(text.rpartition(r"\boxed{")[2])
        return None if answer is None else drop_thousands_separators(answer.rstrip(".,"))
    for phrase in _NUMBER_PHRASES:
        if found := phrase.findall(text):
            return drop_thousands_separators(found[-1].rstrip(".,"))
    return None


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes one opened just before it; None if it stays open."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return None


def _extract_letter(text: str) -> str | None:
    text = text.replace("*", "")
    for phrase in _LETTER_PHRASES:
        if found := phrase.findall(text):
            return found[-1] if found[-1] in LETTERS else None
    return None


# Verdicts


def parse_verdict(text: str, truncated: bool) -> int:
    """A judgment's vote: 1 for YES, 0 for NO, -1 if it is cut off, missing or contradictory.

    `[[YES]]` and `[[NO]]` decide; only without either do the bare words, in capitals.
    """
    judgment = None if truncated else after_thinking(text)
    if judgment is None:
        return -1
    votes = set(re.findall(r"\[\[(YES|NO)\]\]", judgment)) or set(re.findall(r"\b(YES|NO)\b", judgment))
    return {frozenset({"YES"}): 1, frozenset({"NO"}): 0}.get(frozenset(votes), -1)


# Questions


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_JSON_BLOCK = re.compile(r"```json(.*?)```", re.DOTALL)


def parse_question(
    task: str, text: str, truncated: bool, count_tokens: Callable[[str], int], max_reference_tokens: int
) -> Question | Outcome:
    """The question in the questioner's text, or the outcome of an attempt without one.

    `truncated`: the engine stopped at the length limit. `count_tokens` measures text references, which
    may have `max_reference_tokens` tokens.
    """
    answer = None if truncated else after_thinking(text)
    if answer is None:
        return Outcome.TRUNCATED
    return question_from_record(task, read_record(answer), count_tokens, max_reference_tokens)


def read_record(text: str) -> dict[str, Any]:
    """The JSON object of the last fenced json block that parses, or of the whole text; {} without one."""
    text = _CONTROL.sub("", text)
    for block in [*reversed(_JSON_BLOCK.findall(text)), text]:
        try:
            record = json.loads(block)
        except (ValueError, RecursionError):  # RecursionError: nested too deeply
            continue
        return record if isinstance(record, dict) else {}
    return {}


def question_from_record(
    task: str, record: dict[str, Any], count_tokens: Callable[[str], int], max_reference_tokens: int
) -> Question | Outcome:
    """The question in a record of the questioner, or the outcome of an attempt without one."""
    text, answer = _clean(record.get("question")), record.get("answer")
    if not text:
        return Outcome.BAD_FORMAT
    kind = answer_kind(task)
    if kind == "number":
        return _number_question(task, text, answer)
    answer = _clean(answer)
    if not answer:
        return Outcome.BAD_FORMAT
    if kind == "letter":
        return _choice_question(task, text, record.get("options"), answer)
    stated = extract_answer(task, answer)
    reference = answer if stated is None else stated
    if not reference:
        return Outcome.BAD_FORMAT
    if count_tokens(reference) > max_reference_tokens:
        return Outcome.LONG_REFERENCE
    return Question(task, text, reference)


def _number_question(task: str, text: str, answer: object) -> Question | Outcome:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return Outcome.BAD_FORMAT
    try:
        stated = str(answer)
    except ValueError:  # an integer of more digits than Python prints
        return Outcome.UNPARSABLE_NUMBER
    value = parse_number(extract_answer(task, stated) or stated)
    if value is None:
        return Outcome.UNPARSABLE_NUMBER
    if value == 0:
        return Outcome.ZERO_ANSWER
    return Question(task, text, format_decimal(value))


def _choice_question(task: str, stem: str, options: object, answer: str) -> Question | Outcome:
    if not isinstance(options, dict):
        return Outcome.BAD_FORMAT
    values = [options.get(letter) for letter in LETTERS]
    texts = tuple(_clean(str(value)) if isinstance(value, int | float) else _clean(value) for value in values)
    letter = extract_answer(task, answer) or answer
    if not all(texts) or letter not in tuple(LETTERS):
        return Outcome.BAD_FORMAT
    return Question(task, choice_text(stem, texts), letter, stem, texts)


def choice_text(stem: str, options: Sequence[str]) -> str:
    """A multiple-choice question as responders are shown it: the stem, then a line for each of the four options."""
    labelled = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([stem, "", "Choices:", *labelled])


def _clean(value: object) -> str:
    """A string without control characters, lone surrogates and outer blanks; "" for what is no string."""
    if not isinstance(value, str):
        return ""
    return _CONTROL.sub("", value).encode("utf-8", "replace").decode("utf-8").strip()


def format_decimal(value: float) -> str:
    """A finite number in decimals, never in scientific notation: 1200.0 -> 1200, 1e-05 -> 0.00001."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")
