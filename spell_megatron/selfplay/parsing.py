"""From model text to typed outcomes: a question, an answer, a verdict, or the reason there is none.

All functions are total: no text makes them raise, and each takes time linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from spell_megatron.selfplay.characters import canonical
from spell_megatron.selfplay.keywords import from_the_end
from spell_megatron.selfplay.latex import without_latex
from spell_megatron.selfplay.letters import LETTERS, letter_alone, letter_at
from spell_megatron.selfplay.numbers import (
    drop_thousands_separators,
    format_decimal,
    in_parentheses,
    number_alone,
    number_at,
    parse_number,
)
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.prompts import EVIDENCE
from spell_megatron.selfplay.records import CONTROL, read_record
from spell_megatron.selfplay.references import says_something
from spell_megatron.selfplay.scoring import answer_kind
from spell_megatron.selfplay.statements import called_right, statements
from spell_megatron.selfplay.texts import text_at


@dataclass(frozen=True)
class Question:
    """A question with its reference answer.

    `text` is what responder and verifier are shown. For multiple choice it is made of `stem` and the
    four `options`, and `reference` is a letter. `quotes` are the passages on which the questioner says that it rests.
    """

    task: str
    text: str
    reference: str
    stem: str = ""
    options: tuple[str, ...] = ()
    quotes: tuple[str, ...] = ()

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


# Answers


def after_thinking(text: str) -> str | None:
    """What follows the last `</think>` (all of it without one), stripped; None if thinking does not end."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest.strip()


def parse_answer(task: str, text: str, truncated: bool) -> str | None:
    """The answer that a response states last, in the form `scoring.rule_score` takes; None if there is none.

    `truncated`: the engine stopped at the length limit, so whatever stands there is no final answer.
    """
    response = None if truncated else after_thinking(text)
    return None if response is None else extract_answer(task, response)


def extract_answer(task: str, text: str) -> str | None:
    """The answer that a text states last, by the kind of answers of the task.

    A number or a letter may also stand alone, in the last line. A statement that names several, or a range, is one too:
    it is read, and matches no reference.
    """
    kind = answer_kind(task)
    for content, is_box in statements(text):
        if kind == "letter":
            answer = letter_at(content)
        elif kind == "text":
            answer = text_at(without_latex(content) if is_box else content)
        elif is_box:
            answer = drop_thousands_separators(content.strip().rstrip(".,")) or None
        else:
            answer = number_at(content)
        if answer is not None:
            return answer or None
    if kind == "letter":
        return letter_alone(text)
    said = called_right(text) or ""
    return text_at(said) if kind == "text" else number_at(said) or number_alone(text)


# Verdicts


_DECISION_WORDS = ("decision", "verdict", "judgment", "judgement", "conclusion", "final answer", "判断", "结论")
_COLON = re.compile(r"[\"'*_`\s]*[:：]")
_VOTE = r"\[\[[^\w\[\]]{0,9}(YES|NO)[^\w\[\]]{0,9}\]\]"
_OR = r"\s*(?:or|and|/|\|)\s*"
_FORM = re.compile(rf"{_VOTE}\s*(?:\([^()]{{0,40}}\))?{_OR}{_VOTE}|\[\[\s*YES{_OR}NO\s*\]\]", re.IGNORECASE)
_BRACKETED = re.compile(_VOTE, re.IGNORECASE)
# A NO before another word is one of a sentence ("NO difference"), unless it is named beside the other one.
_WORD = re.compile(r"\b(?:(YES)|(NO))\b(?!(?<=NO) +(?!(?:and|or)\b)\w)")


def parse_verdict(text: str, truncated: bool) -> int:
    """A judgment's vote: 1 for YES, 0 for NO, -1 if it is cut off, missing or contradictory.

    What follows the last "Decision:" counts, or all of it if nothing there is a vote. `[[YES]]` and `[[NO]]` decide. If
    there are several, it is the one directly after the colon, or else the last one, but not where both are only named
    as the form of a decision, and never if the other one stands directly beside it. Without either the bare words do,
    in capitals.
    """
    judgment = None if truncated else after_thinking(text)
    if judgment is None:
        return -1
    for part in (_decision(judgment), judgment):
        said = _FORM.sub("", part)
        named = list(_BRACKETED.finditer(said))
        votes = [vote for vote in named if said[max(0, vote.start() - 4) : vote.start()].lower() != "not "]
        if any(a[1].upper() != b[1].upper() and not said[a.end() : b.start()].strip() for a, b in pairwise(votes)):
            return -1
        if votes:
            at_once = part is not judgment and not re.search(r"\w", said[: votes[0].start()])
            return int(votes[0 if at_once else -1][1].upper() == "YES")
        if named:
            return -1
        if words := {yes or no for yes, no in _WORD.findall(said)}:
            return {frozenset({"YES"}): 1, frozenset({"NO"}): 0}.get(frozenset(words), -1)
        if said != part:
            break
    return -1


def _decision(judgment: str) -> str:
    """What follows the last word for a decision with a colon; all of the text without one."""
    for start, word in from_the_end(judgment, _DECISION_WORDS):
        if colon := _COLON.match(judgment, start + len(word)):
            return judgment[colon.end() :]
    return judgment


# Questions


_LABEL = re.compile(r"[\s*]*[(\[]?([A-Da-d])[)\].:]+\s*(?=\S)")


def parse_question(
    task: str, text: str, truncated: bool, count_tokens: Callable[[str], int], max_reference_tokens: int
) -> Question | Outcome:
    """The question in the questioner's text, or the outcome of an attempt without one.

    `truncated`: the engine stopped at the length limit. `count_tokens` measures text references, which
    may have `max_reference_tokens` tokens.
    """
    return question_in(
        text, truncated, lambda record: question_from_record(task, record, count_tokens, max_reference_tokens)
    )


def question_in(
    text: str, truncated: bool, from_record: Callable[[dict[str, Any]], Question | Outcome]
) -> Question | Outcome:
    """The question in the questioner's text, as `from_record` reads its record; the outcome of one without it."""
    answer = None if truncated else after_thinking(text)
    if answer is None:
        return Outcome.TRUNCATED
    record = read_record(answer)
    question = from_record(record)
    return question if isinstance(question, Outcome) else replace(question, quotes=_quotes(record))


def _quotes(record: dict[str, Any]) -> tuple[str, ...]:
    """The quotes in a record of the questioner: a list of texts, or one; () if it is anything else."""
    evidence = next((value for key, value in record.items() if str(key).strip().lower() == EVIDENCE), None)
    quotes = [evidence] if isinstance(evidence, str) else evidence
    if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
        return ()
    return tuple(filter(None, map(clean_text, quotes)))


def question_from_record(
    task: str, record: dict[str, Any], count_tokens: Callable[[str], int], max_reference_tokens: int
) -> Question | Outcome:
    """The question in a record of the questioner, or the outcome of an attempt without one."""
    record = {str(key).strip().lower(): value for key, value in record.items()}
    text, answer = clean_text(record.get("question")), record.get("answer")
    if not text or isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return Outcome.BAD_FORMAT
    try:
        answer = clean_text(str(answer))
    except ValueError:  # an integer of more digits than Python prints
        return Outcome.UNPARSABLE_NUMBER if answer_kind(task) == "number" else Outcome.LONG_REFERENCE
    if not answer:
        return Outcome.UNPARSABLE_NUMBER if answer_kind(task) == "number" else Outcome.BAD_FORMAT
    match answer_kind(task):
        case "number":
            return _number_question(task, text, answer)
        case "letter":
            return _choice_question(task, text, record.get("options"), answer)
    reference = extract_answer(task, answer) or answer
    if count_tokens(reference) > max_reference_tokens:
        return Outcome.LONG_REFERENCE
    return Question(task, text, reference) if says_something(reference) else Outcome.BAD_FORMAT


def _number_question(task: str, text: str, answer: str) -> Question | Outcome:
    stated = extract_answer(task, answer)
    value = parse_number(answer if stated is None or parse_number(answer) is not None else stated)
    if value is None:
        return Outcome.UNPARSABLE_NUMBER
    if value == 0:
        return Outcome.ZERO_ANSWER
    return Question(task, text, format_decimal(-value if in_parentheses(answer) else value))


def _choice_question(task: str, stem: str, options: object, answer: str) -> Question | Outcome:
    texts = _options(options)
    letter = answer if answer in tuple(LETTERS) else extract_answer(task, answer) or letter_at(answer)
    if not all(texts) or len({_bare(text) for text in texts}) < len(LETTERS) or not letter:
        return Outcome.BAD_FORMAT
    return Question(task, choice_text(stem, texts), letter, stem, texts)


def _options(options: object) -> tuple[str, ...]:
    """The texts of the options A to D, of an object or a list, without their labels; "" for what is no text."""
    if isinstance(options, list) and len(options) == len(LETTERS):
        options = dict(zip(LETTERS, options, strict=True))
    named = (
        {str(key).strip(" ().").upper(): value for key, value in options.items()} if isinstance(options, dict) else {}
    )
    values = [named.get(letter) for letter in LETTERS]
    texts = [clean_text(str(v)) if isinstance(v, int | float) else clean_text(v) for v in values]
    labels = [_LABEL.match(text) for text in texts]
    if [label and label[1].upper() for label in labels] == list(LETTERS):
        texts = [text[label.end() :] for text, label in zip(texts, labels, strict=True) if label]
    return tuple(texts)


def _bare(option: str) -> str:
    """An option as it is compared with others: without case, blanks and a full stop."""
    return "".join(canonical(option).casefold().split()).rstrip(".")


def choice_text(stem: str, options: Sequence[str]) -> str:
    """A multiple-choice question as responders are shown it: the stem, then a line for each of the four options."""
    labelled = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([stem, "", "Choices:", *labelled])


def clean_text(value: object) -> str:
    """A string without control characters, lone surrogates and outer blanks; "" for what is no string."""
    if not isinstance(value, str):
        return ""
    return CONTROL.sub("", value).encode("utf-8", "replace").decode("utf-8").strip()
