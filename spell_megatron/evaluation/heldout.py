"""Accuracy on held-out questions with known answers, scored by rule."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

from spell_megatron.config.schema import SamplingConfig, Task
from spell_megatron.errors import UserError
from spell_megatron.evaluation.scores import middle_truncate, pass_at_k
from spell_megatron.files import read_json_objects
from spell_megatron.selfplay.documents import known_answer, valid_unicode
from spell_megatron.selfplay.parsing import parse_answer
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.scoring import rule_score
from spell_megatron.selfplay.stream import Client, Tokenizer, derive_seed


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question over documents that training never sees."""

    id: str
    task: str
    question: str
    answer: str
    documents: tuple[str, ...]


def load_questions(path: Path, limit: int | None = None) -> list[HeldOutQuestion]:
    """Read questions from a JSONL file: task, question, answer, documents and optionally id.

    Raises:
        UserError: naming the first ten faulty lines.
    """
    questions, faults = [], []
    for number, row in read_json_objects(path, "file of questions"):
        if missing := [name for name in ("task", "question", "answer", "documents") if name not in row]:
            faults.append(f"line {number} has no {', '.join(map(repr, missing))}")
            continue
        try:
            questions.append(_question(row, number))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults or not questions:
        detail = "; ".join(faults[:10]) or "it holds no questions"
        raise UserError(
            f"The questions in {path} cannot be used: {detail}. Each line must be a JSON object with task, question, "
            "answer and documents."
        )
    return questions[:limit]


def _question(row: Mapping[str, Any], number: int) -> HeldOutQuestion:
    """The question of a row that has all fields. ValueError: one of them cannot be used."""
    task, question, documents = row["task"], row["question"], row["documents"]
    if task not in get_args(Task):
        raise ValueError(f"task {task!r} is none of {', '.join(get_args(Task))}")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text, not {question!r}")
    if not isinstance(documents, list) or not documents or not all(isinstance(d, str) and d for d in documents):
        raise ValueError("documents must be a list of texts that are not empty")
    answer = known_answer(task, row["answer"])
    key = number if row.get("id") is None else row["id"]
    return HeldOutQuestion(str(key), task, valid_unicode(question), answer, tuple(map(valid_unicode, documents)))


async def validate(
    client: Client,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    sampling: SamplingConfig,
    questions: Sequence[HeldOutQuestion],
    samples: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Answer every question `samples` times and score the answers by rule.

    The sampling temperature is the rollout's. Prompts over the limit lose tokens in the middle, so
    that the question at the end survives. Returns pass@1 and pass@samples (unbiased estimate, paper
    Eq. 11) over all questions and per task, and the standard error of pass@1 over questions.
    """
    done = 0

    async def correct(question: HeldOutQuestion) -> int:
        nonlocal done
        prompt = prompts.responder(question.task, question.question, question.documents)
        ids = middle_truncate(tokenizer.prompt_ids(prompt), sampling.max_prompt_tokens)
        completions = await client.generate(
            ids,
            n=samples,
            seed=derive_seed(seed, "held-out", question.id),
            max_tokens=sampling.max_response_tokens,
            affinity=question.documents[0],
            prompt_routing=False,
        )
        predictions = [
            parse_answer(question.task, tokenizer.decode(c.token_ids), c.finish_reason == "length") for c in completions
        ]
        done += 1
        on_progress(done)
        return sum(rule_score(question.task, prediction, question.answer) for prediction in predictions)

    counts = await asyncio.gather(*(correct(question) for question in questions))
    metrics: dict[str, float] = {}
    tasks = sorted({question.task for question in questions})
    of_task = {t: [c for c, q in zip(counts, questions, strict=True) if q.task == t] for t in tasks}
    for name, members in [("", counts), *((f"{t}/", some) for t, some in of_task.items())]:
        for k in sorted({1, samples}):
            metrics[f"validation/{name}pass@{k}"] = fmean(pass_at_k(samples, c, k) for c in members)
    if len(counts) > 1:
        metrics["validation/standard_error"] = stdev(c / samples for c in counts) / len(counts) ** 0.5
    return metrics
