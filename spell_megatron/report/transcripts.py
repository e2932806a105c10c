"""Transcripts: questions of the rollout dumps of a run, each with its answers and judgments."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, overload

from spell_megatron.files import json_lines
from spell_megatron.plural import counted
from spell_megatron.report.runs import Run, number

MAX_JUDGMENT_SHARE = 4
"""Judgments are cut to texts this many times shorter than others, because an answer has many of them."""

MAX_NAME = 200
"""Longest name of a document or cluster, in characters."""

MAX_DOCUMENTS = 50
"""Most documents of a prompt that are named."""

QUESTIONS_PER_STEP = 5
"""Transcripts come from as many steps as give about so many questions each."""


def choose_dumps(run: Run, transcripts: int) -> list[tuple[Path, int]]:
    """Rollout dumps to read, at evenly spread steps, and how many questions to take from each.

    Args:
        transcripts: most questions of the run.
    """
    last = run.steps[-1] if run.steps else -1  # files of later steps belong to a step that is not done
    files = {}
    for file in sorted((run.folder / "rollouts").glob("step_*.*")):
        match = re.fullmatch(r"step_(\d+)\.(jsonl|parquet)", file.name)
        if match and int(match[1]) <= last:
            files[int(match[1])] = file
    steps = sorted(files)
    wanted = min(len(steps), -(-transcripts // QUESTIONS_PER_STEP))
    chosen = [steps[i] for i in _spread(len(steps), wanted)]
    shares = [transcripts * (i + 1) // wanted - transcripts * i // wanted for i in range(wanted)]
    if chosen and len(chosen) < len(steps):
        run.notes.append(f"transcripts of {len(chosen)} of its {counted(len(steps), 'step')}; --transcripts N for more")
    return [(files[step], share) for step, share in zip(chosen, shares, strict=True)]


def _spread(length: int, count: int) -> list[int]:
    """`count` positions of a sequence, evenly spread, the first and the last among them."""
    if count == 1:
        return [length - 1]
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def read_questions(file: Path, count: int, text_chars: int, run: int, notes: list[str]) -> list[dict[str, Any]]:
    """At most `count` questions of a step's file, each with its answers and judgments, as the page wants them.

    Of every task and outcome there are as many as of the others, as far as there are enough.
    """
    try:
        questions = [_question(list(rows), text_chars, run) for _, rows in groupby(_rows(file), lambda row: row["uid"])]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        notes.append(f"{file.name} cannot be read ({type(error).__name__}: {error}) and is left out")
        return []
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        kinds[question["task"], question["outcome"]].append(index)
    taken: list[int] = []
    quotas = dict.fromkeys(kinds, 0)
    while len(taken) < min(count, len(questions)):
        for kind, members in kinds.items():
            if quotas[kind] < len(members) and len(taken) < count:
                taken.append(members[quotas[kind]])
                quotas[kind] += 1
    return [questions[index] for index in sorted(taken)]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".jsonl":
        for number, row, fault in json_lines(file):
            if fault:
                raise ValueError(f"line {number} {fault}")
            yield row
    else:
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _question(rows: Iterable[dict[str, Any]], text_chars: int, run: int) -> dict[str, Any]:
    """One attempt at a question, out of the rows that bear its uid."""
    question = next((row for row in rows if row["role"] == "questioner"), None)
    answers = [row for row in rows if row["role"] == "responder"]
    judgments: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["role"] == "verifier":
            judgments[row["group"]].append(row)
    first = question or next(iter(rows))
    asked = None
    if question:
        asked = _sample(question, text_chars) | {
            "gate": number(question.get("gate")),
            "text": shorten(question["prediction"], text_chars),
            "prompt": shorten(question["prompt"], text_chars),
            "documents": _names(question["document_ids"]),
        }
    return {
        "run": run,
        "step": first["step"],
        "uid": first["uid"],
        "task": first["task"],
        "cluster": shorten(first["cluster_id"], MAX_NAME),
        "outcome": first.get("outcome") or _older_outcome(question, answers),
        "reference": shorten(first["reference"], text_chars),
        "question": asked,
        "documents": _names(answers[0]["document_ids"]) if answers else [],
        "responder_prompt": shorten(answers[0]["prompt"], text_chars) if answers else None,
        "answers": [
            _sample(answer, text_chars)
            | {
                "prediction": shorten(answer["prediction"], text_chars // MAX_JUDGMENT_SHARE),
                "rule": answer["rule_score"],
                "verdict": answer["verdict"],
                # the verifier's groups bear the number of the answer
                "judgments": [
                    _sample(row, text_chars // MAX_JUDGMENT_SHARE) | {"vote": row["verdict"]}
                    for row in judgments[f"{first['uid']}/{index}"]
                ],
            }
            for index, answer in enumerate(answers)
        ],
    }


def _sample(row: dict[str, Any], text_chars: int) -> dict[str, Any]:
    return {
        "reward": number(row["reward"]),
        "advantage": number(row["advantage"]),
        "output": shorten(row["output"], text_chars),
        "tokens": row["response_tokens"],
        "prompt_tokens": row["prompt_tokens"],
        "truncated": row["truncated"],
    }


def _older_outcome(question: dict[str, Any] | None, answers: Sequence[dict[str, Any]]) -> str:
    """How an attempt ended, as far as the rows of files tell that were written before rows had an `outcome`."""
    kind = question["kind"] if question else "good"
    if kind in ("bad_format", "bad_ground"):
        return "ungrounded" if kind == "bad_ground" else kind
    rewards = {answer["reward"] for answer in answers}
    if not rewards:
        return "dropped"
    if len(rewards) > 1:
        return "mixed"
    return "all_1" if rewards == {1.0} else "all_0"


def _names(documents: Sequence[str]) -> list[str]:
    """Names of documents, the first `MAX_DOCUMENTS` of them."""
    named = [shorten(name, MAX_NAME) for name in documents[:MAX_DOCUMENTS]]
    return [*named, f"{len(documents) - MAX_DOCUMENTS} more"] if len(documents) > MAX_DOCUMENTS else named


@overload
def shorten(text: str, limit: int) -> str: ...
@overload
def shorten(text: str | None, limit: int) -> str | None: ...
def shorten(text: str | None, limit: int) -> str | None:
    """A text without its middle if it is longer than `limit` characters, and how much is missing."""
    if text is None or len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}\n[… {len(text) - limit:,} characters left out …]\n{text[len(text) - limit + head :]}"
