"""A task whose answers are names, which must be written exactly as in the documents."""

from pathlib import Path
from typing import Any

from spell_megatron.selfplay.parsing import extract_answer
from spell_megatron.selfplay.tasks import Task


def question(record: dict[str, Any]) -> tuple[str, str] | None:
    """The question and its reference, if that is a name."""
    asked, name = record.get("question"), record.get("answer")
    if not isinstance(asked, str) or not isinstance(name, str) or not name[:1].isupper():
        return None
    return asked, name


def answer(response: str) -> str | None:
    """What stands after "The correct answer is", or None."""
    return extract_answer("doc_general_qa", response)


def score(prediction: str, reference: str) -> bool:
    return prediction == reference


task = Task(prompts=Path(__file__).parent / "name_prompts", question=question, answer=answer, score=score)
