"""What the report shows of folders that `spell evaluate` has written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.evaluation.results import COLUMNS, MEASURES

FACTS = {
    "model": "model",
    "max_input": "input limit",
    "max_output": "output limit",
    "temperature": "temperature",
    "top_p": "top-p",
    "samples": "samples a question",
    "judge": "judge",
}
"""Settings of an evaluation that its card names, and as what."""


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds what an evaluation found."""
    return (folder / "scores.json").is_file()


def read_evaluation(folder: Path, name: str) -> dict[str, Any]:
    """The numbers of an evaluation as the page wants them.

    `columns`: {column of the paper's table, `Avg`, or benchmark that is in none: {measure: pass@k}}, where pass@k is a
    list of [k, mean, low, high], shares of 1. `benchmarks`: what stands behind them.

    Raises:
        UserError: its scores.json is damaged.
    """
    path = folder / "scores.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        in_columns = {benchmark for column in results["columns"] for benchmark in COLUMNS[column]}
        curves = dict(results["columns"])
        if results["average"]:
            curves["Avg"] = results["average"]
        curves |= {name: about for name, about in results["benchmarks"].items() if name not in in_columns}
        return {
            "name": name,
            "folder": str(folder),
            "facts": {label: results["settings"].get(key) for key, label in FACTS.items()},
            "interval": str(results["interval"]),
            "columns": {column: {m: _pass_at_k(about[m]) for m in MEASURES} for column, about in curves.items()},
            "questions": {column: _questions(column, results["benchmarks"]) for column in curves},
            "benchmarks": {name: _benchmark(about) for name, about in results["benchmarks"].items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as the scores of an evaluation ({type(error).__name__}: {error}). Remove it and "
            "run the evaluation's command again, which writes it again from the samples and judgments that are there."
        ) from error


def columns(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns of the table of some evaluations: the paper's, their average, then the others as they come."""
    have = {column: None for evaluation in evaluations for column in evaluation["columns"]}
    first = [column for column in (*COLUMNS, "Avg") if column in have]
    return [*first, *(column for column in have if column not in first)]


def _questions(column: str, benchmarks: Mapping[str, Any]) -> list[list[Any]]:
    """[benchmark, number of questions] of each benchmark that a column is of."""
    paper = sorted({benchmark for names in COLUMNS.values() for benchmark in names})
    members = paper if column == "Avg" else COLUMNS.get(column, (column,))
    return [[name, benchmarks[name]["questions"]] for name in sorted(members) if name in benchmarks]


def _pass_at_k(estimates: Mapping[str, Mapping[str, float]]) -> list[list[float]]:
    return [[int(name.removeprefix("pass@")), *_estimate(estimate)] for name, estimate in estimates.items()]


def _estimate(estimate: Mapping[str, float]) -> list[float]:
    values = [float(estimate[part]) for part in ("mean", "low", "high")]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{estimate} is not an estimate")
    return values


def _benchmark(about: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("questions", "samples", "judged", "judged_yes", "judged_unparsable", "answers_without_statement")
    return {
        **{key: about[key] for key in (*kept, "answers_cut", "prompts_cut", "answer_tokens")},
        "score": _estimate(about["score"]["pass@1"]),
        "rule": _estimate(about["rule"]["pass@1"]),
        "subsets": {
            subset: {"questions": part["questions"], "score": _estimate(part["score"]["pass@1"])}
            for subset, part in about["subsets"].items()
        },
    }
