"""A rule check that takes no number for another one."""

from spell_megatron.selfplay.numbers import parse_number
from spell_megatron.selfplay.scoring import rule_score


def score(task: str, prediction: str, reference: str) -> bool:
    """Whether the prediction is right: numbers must be equal, texts and letters as usual."""
    if task == "docmath_qa":
        return parse_number(prediction) == parse_number(reference)
    return bool(rule_score(task, prediction, reference))
