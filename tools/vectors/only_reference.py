"""What only the reference computes.

This project has no use for these functions: rule checks decide instead of token F1, engines end a response at
its first end of sequence, the trainer divides a sum over all tokens, and evaluations have averages of their own.
They stand here so that every vector can be run.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from statistics import fmean
from typing import Any

from vectors.functions import function


def words(text: str) -> str:
    """The reference's normal form of a text: lower case, without ASCII punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, reference: str) -> tuple[float, float, float]:
    """F1, precision and recall of the normalised words, as LongBench reports them.

    All are 0 when one side is yes, no or noanswer and the other is not the same.
    """
    predicted, expected = words(prediction), words(reference)
    if predicted != expected and {predicted, expected} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0, 0.0
    found, wanted = predicted.split(), expected.split()
    common = (Counter(found) & Counter(wanted)).total()
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall), precision, recall


@function("docqa.f1_score")
def _(input: dict) -> Any:
    return token_f1(input["prediction"], input["ground_truth"])


@function("response_mask")
def _(input: dict) -> Any:
    """1 up to and including the first end of sequence."""
    ends = {input["eos"]} if isinstance(input["eos"], int) else set(input["eos"])
    masks = []
    for ids in input["response_ids"]:
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        masks.append([int(i < length) for i in range(len(ids))])
    return masks


def ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


@function("agg_loss")
def _(input: dict) -> Any:
    """Padded losses of tokens, as one number."""
    rows = zip(input["loss"], input["mask"], strict=True)
    sums = [sum(x * m for x, m in zip(loss, mask, strict=True)) for loss, mask in rows]
    counts = [sum(mask) for mask in input["mask"]]
    match input["mode"]:
        case "token-mean":
            return ratio(sum(sums), sum(counts))
        case "seq-mean-token-sum":
            return fmean(sums)
        case "seq-mean-token-mean":
            return fmean(ratio(total, count) for total, count in zip(sums, counts, strict=True))
    raise ValueError(f"unknown mode {input['mode']!r}")


@function("eval.aggregate")
def _(input: dict) -> Any:
    """Mean score of every task over its questions, and the mean of the tasks."""
    tasks = {
        task: fmean(fmean(samples) for samples in questions.values())
        for task, questions in input["task_question_scores"].items()
    }
    return {**tasks, "overall": fmean(tasks.values())}


@function("train_validation.aggregate")
def _(input: dict) -> Any:
    """Mean score of every task over its questions, and the mean of all questions."""
    samples: dict[tuple[str, str], list[float]] = {}
    for task, question, score in input["rows"]:
        samples.setdefault((task, question), []).append(score)
    tasks: dict[str, list[float]] = {}
    for (task, _), values in samples.items():
        tasks.setdefault(task, []).append(fmean(values))
    means = {task: fmean(values) for task, values in tasks.items()}
    return {**means, "overall": fmean(itertools.chain(*tasks.values()))}
