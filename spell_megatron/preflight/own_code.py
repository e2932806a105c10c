"""Code of the user's own, which settings name: it is there, and works on one small example of each input."""

from __future__ import annotations

from collections.abc import Callable

from spell_megatron.config.selfplay_sections import TASKS, SelfPlayConfig
from spell_megatron.preflight.findings import Findings
from spell_megatron.selfplay.tasks import OwnTask, Tasks, own_reward, own_rule, right_or_wrong

EXAMPLES = {"docmath_qa": ("42", "7"), "doc_general_qa": ("Ada Lovelace", "Alan Turing"), "doc_mc": ("B", "C")}
"""Two answers of each built-in task, as rule checks get them."""


def check_own_code(found: Findings, play: SelfPlayConfig) -> Tasks | None:
    """Load the code, call each function, and return the run's tasks; None if something is wrong with it."""
    before = len(found.faults)
    found.attempt("selfplay.rule selfplay.code", lambda: _try_rule(play))
    found.attempt("selfplay.questioner.reward selfplay.code", lambda: _try_reward(play))
    for name in play.own_tasks:
        found.attempt(f"selfplay.own_tasks.{name} selfplay.code", _trial(play, name))
    return Tasks(play) if len(found.faults) == before else None


def _try_rule(play: SelfPlayConfig) -> None:
    if rule := own_rule(play):
        for task in (task for task in TASKS if play.tasks.get(task)):
            for prediction in EXAMPLES[task]:
                right_or_wrong(rule, task, prediction, EXAMPLES[task][0])


def _try_reward(play: SelfPlayConfig) -> None:
    """The reward is in range for every mean that the answers to a question can have."""
    if reward := own_reward(play):
        for right in range(1, play.group_size):
            reward(right / play.group_size, "Who wrote the first program?", "Ada Lovelace")


def _trial(play: SelfPlayConfig, name: str) -> Callable[[], None]:
    def check() -> None:
        task = OwnTask(play, name)
        task.question({"question": "Who wrote the first program?", "answer": "Ada Lovelace"})
        task.question({})
        task.answer("The answer is Ada Lovelace.")
        task.answer("")
        task.score("Ada Lovelace", "Ada Lovelace")
        task.score("Alan Turing", "Ada Lovelace")

    return check
