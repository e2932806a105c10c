"""Scores of an evaluation: pass@k, averages, token F1; and the cut that makes a prompt fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from statistics import fmean
from typing import TypeVar

from spell_megatron.selfplay.scoring import normalize_text

T = TypeVar("T")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right, when c of n were (paper, Eq. 11).

    1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k is not defined for n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


def middle_truncate(tokens: Sequence[T], max_length: int) -> list[T]:
    """Cut a prompt to `max_length` tokens by taking out its middle.

    The first floor(max_length / 2) tokens and the rest from the end stay, the question at the end among
    them.
    """
    if len(tokens) <= max_length:
        return list(tokens)
    head = max_length // 2
    return [*tokens[:head], *tokens[len(tokens) - (max_length - head) :]]


def average_over_tasks(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Mean score of every task, and their unweighted mean as `overall`.

    `scores[task][question]` are the scores of the question's samples.
    """
    means = {task: fmean(fmean(samples) for samples in questions.values()) for task, questions in scores.items()}
    return {**means, "overall": fmean(means.values())}


def average_over_questions(rows: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """Mean score of every task, and the mean over all questions as `overall`.

    `rows` are (task, question, score), one for each sample.
    """
    samples: dict[tuple[str, str], list[float]] = {}
    for task, question, score in rows:
        samples.setdefault((task, question), []).append(score)
    tasks: dict[str, list[float]] = {}
    for (task, _), scores in samples.items():
        tasks.setdefault(task, []).append(fmean(scores))
    means = {task: fmean(scores) for task, scores in tasks.items()}
    return {**means, "overall": fmean(score for scores in tasks.values() for score in scores)}


def token_f1(prediction: str, reference: str) -> tuple[float, float, float]:
    """F1, precision and recall of the normalised words, as LongBench reports them.

    All are 0 when one side is yes, no or noanswer and the other is not the same.
    """
    predicted, expected = normalize_text(prediction), normalize_text(reference)
    if predicted != expected and {predicted, expected} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0, 0.0
    words, reference_words = predicted.split(), expected.split()
    common = (Counter(words) & Counter(reference_words)).total()
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(words), common / len(reference_words)
    return 2 * precision * recall / (precision + recall), precision, recall
