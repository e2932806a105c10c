"""The tasks of a run, built-in ones and the user's own: how their questions, answers and rule checks work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.errors import UserError
from spell_megatron.selfplay.outcomes import Outcome
from spell_megatron.selfplay.own_code import OwnFunction, own_function, own_object
from spell_megatron.selfplay.parsing import (
    Question,
    after_thinking,
    clean_text,
    parse_answer,
    parse_question,
    question_in,
)
from spell_megatron.selfplay.scoring import rule_score


@dataclass(frozen=True)
class Task:
    """A task of one's own, which `selfplay.own_tasks` names (docs/extending.md).

    Attributes:
        prompts: folder with questioner.md, questioner_history.md and responder.md, which have the placeholders of the
            files of that kind in spell_megatron/selfplay/prompt_sets.
        question: from the JSON object that the questioner wrote, with keys in lower case, to (question, reference
            answer); None if it holds none.
        answer: from a response, without what was thought before it, to the answer that it states; None if it states
            none.
        score: whether an answer, the first argument, is as good as the reference, the second: True or False.
    """

    prompts: Path | str
    question: Callable[[dict[str, Any]], tuple[str, str] | None]
    answer: Callable[[str], str | None]
    score: Callable[[str, str], bool]


class OwnTask:
    """A task of the user's own, every value of which is checked.

    Raises:
        UserError: the setting names no task, or its functions cannot be called.
    """

    def __init__(self, play: SelfPlayConfig, name: str) -> None:
        setting, dotted = f"selfplay.own_tasks.{name}", play.own_tasks[name]
        task = own_object(setting, dotted, play.code)
        if not isinstance(task, Task):
            raise UserError(
                f"{dotted}, which {setting} names, is of type {type(task).__name__}. It must be a "
                "spell_megatron.selfplay.tasks.Task, as in examples/extend/archive/dates.py."
            )
        self.name = name
        self.prompts = Path(task.prompts)
        self._question = own_function(setting, f"{dotted}.question", task.question, "record")
        self._answer = own_function(setting, f"{dotted}.answer", task.answer, "response")
        self._score = own_function(setting, f"{dotted}.score", task.score, "prediction, reference")

    def question(self, record: dict[str, Any]) -> Question | Outcome:
        """The question in a record of the questioner, or the outcome of an attempt without one."""
        record = {str(key).strip().lower(): value for key, value in record.items()}
        value = self._question(record)
        if value is None:
            return Outcome.BAD_FORMAT
        if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(text, str) for text in value):
            raise self._question.refuse((record,), value, "(question, reference answer), two texts, or None")
        text, reference = map(clean_text, value)
        return Question(self.name, text, reference) if text and reference else Outcome.BAD_FORMAT

    def answer(self, response: str) -> str | None:
        value = self._answer(response)
        if value is not None and not isinstance(value, str):
            raise self._answer.refuse((response,), value, "a text or None")
        return (value and clean_text(value)) or None

    def score(self, prediction: str, reference: str) -> int:
        return right_or_wrong(self._score, prediction, reference)


class Tasks:
    """How questions are read, answers are read and answers are checked in each task of a run.

    Raises:
        UserError: code of the user's own cannot be used.
    """

    def __init__(self, play: SelfPlayConfig) -> None:
        self._rule = own_rule(play)
        self._own = {name: OwnTask(play, name) for name in play.own_tasks}

    @property
    def own_prompts(self) -> dict[str, Path]:
        """The folder with the prompts of each task of the user's own."""
        return {name: task.prompts for name, task in self._own.items()}

    def question(
        self, task: str, text: str, truncated: bool, count_tokens: Callable[[str], int], max_reference_tokens: int
    ) -> Question | Outcome:
        """The question in the questioner's text, or the outcome of an attempt without one (see `parse_question`)."""
        if own := self._own.get(task):
            return question_in(text, truncated, own.question)
        return parse_question(task, text, truncated, count_tokens, max_reference_tokens)

    def answer(self, task: str, text: str, truncated: bool) -> str | None:
        """The answer that a response states, in the form `score` takes; None if there is none."""
        if own := self._own.get(task):
            response = None if truncated else after_thinking(text)
            return None if response is None else own.answer(response)
        return parse_answer(task, text, truncated)

    def score(self, task: str, prediction: str | None, reference: str) -> int:
        """1 if the rule check finds the prediction right, else 0, also without one.

        Raises:
            OwnCodeError: a rule check of the user's own failed.
        """
        if prediction is None:
            return 0
        if own := self._own.get(task):
            return own.score(prediction, reference)
        if self._rule:
            return right_or_wrong(self._rule, task, prediction, reference)
        return rule_score(task, prediction, reference)


def own_rule(play: SelfPlayConfig) -> OwnFunction | None:
    """The user's own rule check of built-in tasks; None without one."""
    if play.rule is None:
        return None
    return _function("selfplay.rule", play.rule, play.code, "task, prediction, reference")


def own_reward(play: SelfPlayConfig) -> Callable[[float, str, str], float] | None:
    """The user's own reward of questions: from the answers' mean reward, the question and its reference to [0, 1]."""
    name = play.questioner.own_reward
    if name is None:
        return None
    function = _function("selfplay.questioner.reward", name, play.code, "mean, question, reference")

    def reward(mean: float, question: str, reference: str) -> float:
        value = function(mean, question, reference)
        number = _number(value)
        if not 0 <= number <= 1:
            raise function.refuse((mean, question, reference), value, "a number from 0 to 1")
        return number

    return reward


def right_or_wrong(function: OwnFunction, *arguments: str) -> int:
    """1 or 0, as a rule check of the user's own says.

    Raises:
        OwnCodeError: it says something else.
    """
    value = function(*arguments)
    number = _number(value)
    if number not in (0, 1):
        raise function.refuse(arguments, value, "True or False")
    return int(number)


def _function(setting: str, name: str, folder: Path | None, parameters: str) -> OwnFunction:
    return own_function(setting, name, own_object(setting, name, folder), parameters)


def _number(value: Any) -> float:
    """A number as Python's float, also if it is numpy's or torch's; NaN for everything else."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan
