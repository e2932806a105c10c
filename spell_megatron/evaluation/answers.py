"""Answers from elsewhere, which an evaluation scores instead of generating any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.files import MAX_FAULTS, read_json_objects
from spell_megatron.selfplay.references import valid_unicode


def read_answers(path: Path, questions: Sequence[BenchmarkQuestion]) -> list[dict[str, Any]]:
    """Answers from elsewhere: lines with `id`, `text` and, if there are several benchmarks, `benchmark`.

    `cut`: true says that an answer ended at its limit. Several lines of a question are its samples.

    Raises:
        UserError: lines that are not of this form, of no question, or not equally many of each question.
    """
    wanted = {(question.benchmark, question.id): 0 for question in questions}
    benchmarks = {question.benchmark for question in questions}
    only = next(iter(benchmarks)) if len(benchmarks) == 1 else None
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, row in read_json_objects(path, "file of answers"):
        try:
            key, text, cut = (
                (row.get("benchmark", only), valid_unicode(str(row["id"]))),
                row["text"],
                row.get("cut", False),
            )
            if key not in wanted:
                raise ValueError(f"there is no question {key[1]!r} of {key[0]!r}")
            if not isinstance(text, str) or not isinstance(cut, bool):
                raise ValueError("text must be a string, and cut true or false")
        except KeyError as error:
            faults.append(f"line {number} has no {error}")
        except (ValueError, TypeError) as error:
            faults.append(f"line {number}: {error}")
        else:
            rows.append({"benchmark": key[0], "id": key[1], "text": text, "cut": cut})
            wanted[key] += 1
    counts = {count for (name, _), count in wanted.items()}
    if not faults and (len(counts) > 1 or 0 in counts):
        fewest = min(wanted, key=lambda key: wanted[key])
        faults.append(
            f"it has {wanted[fewest]} answers to question {fewest[1]!r} of {fewest[0]!r}, and {max(counts)} to others"
        )
    if faults:
        raise UserError(
            f"The answers in {path} cannot be used: {'; '.join(faults[:MAX_FAULTS])}. Each line must be a JSON object "
            "with id, text and, if there are several benchmarks, benchmark; every question must have equally many."
        )
    return rows
