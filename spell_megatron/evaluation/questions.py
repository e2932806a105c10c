"""Questions with known answers over documents that training never sees, and the JSONL files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spell_megatron.config.selfplay_sections import TASKS
from spell_megatron.errors import UserError
from spell_megatron.files import MAX_FAULTS, read_json_objects
from spell_megatron.selfplay.references import known_answer, shown, valid_unicode


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question over documents that training never sees. `aliases` are other answers that are right, too."""

    id: str
    task: str
    question: str
    answer: str
    documents: tuple[str, ...]
    aliases: tuple[str, ...] = field(default=(), kw_only=True)


def load_questions(path: Path, limit: int | None = None, tasks: Sequence[str] = TASKS) -> list[HeldOutQuestion]:
    """Read questions from a JSONL file: task, question, answer, documents and optionally id and aliases.

    `tasks` are those that a line may name.

    Raises:
        UserError: naming the first ten faulty lines.
    """
    questions, faults = [], []
    for number, row in read_json_objects(path, "file of questions"):
        if missing := [name for name in ("task", "question", "answer", "documents") if name not in row]:
            faults.append(f"line {number} has no {', '.join(map(repr, missing))}")
            continue
        try:
            questions.append(_question(row, number, tasks))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults or not questions:
        detail = "; ".join(faults[:MAX_FAULTS]) or "it holds no questions"
        raise UserError(
            f"The questions in {path} cannot be used: {detail}. Each line must be a JSON object with task, question, "
            "answer and documents."
        )
    return questions[:limit]


def _question(row: Mapping[str, Any], number: int, tasks: Sequence[str]) -> HeldOutQuestion:
    """The question of a row that has all fields. ValueError: one of them cannot be used."""
    task, question, documents = row["task"], row["question"], row["documents"]
    if task not in tasks:
        raise ValueError(f"task {task!r} is none of {', '.join(tasks)}")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text, not {question!r}")
    if not isinstance(documents, list) or not documents or not all(isinstance(d, str) and d for d in documents):
        raise ValueError("documents must be a list of texts that are not empty")
    aliases = [] if row.get("aliases") is None else row["aliases"]
    if not isinstance(aliases, list):
        raise ValueError(f"aliases must be a list of answers, not {shown(aliases)}")
    answer, *aliases = (known_answer(task, value) for value in (row["answer"], *aliases))
    key = number if row.get("id") is None else row["id"]
    return HeldOutQuestion(
        valid_unicode(str(key)),
        task,
        valid_unicode(question),
        answer,
        tuple(map(valid_unicode, documents)),
        aliases=tuple(aliases),
    )
