"""From answers to numbers: scores of samples, pass@k with intervals, and the columns of the paper's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.pass_at_k import pass_at_k
from spell_megatron.selfplay.parsing import parse_answer
from spell_megatron.selfplay.scoring import answer_kind, rule_score

COLUMNS: dict[str, tuple[str, ...]] = {
    "DocMath": ("docmath",),
    "Frames": ("frames",),
    "LB-MQA": ("2wikimqa", "hotpotqa", "musique"),
    "LB-V2": ("longbench-v2",),
}
"""The columns of the paper's table. Each is the mean over its benchmarks, and the average is over the columns."""

MEASURES = ("score", "rule")
RESAMPLES = 2000
INTERVAL = f"95 %, percentiles of {RESAMPLES} bootstrap resamples of the questions"


UNPARSABLE = -1
"""The verdict of a judgment that cannot be read."""


@dataclass
class Sample:
    """One answer. `verdict` is the judge's: 1 yes, 0 no, -1 unparsable, None: not asked."""

    prediction: str | None
    """What the answer states; None: nothing."""
    rule: int
    cut: bool
    prompt_cut: bool
    tokens: int | None
    verdict: int | None = None

    @classmethod
    def of(cls, question: BenchmarkQuestion, row: Mapping[str, Any]) -> Sample:
        """Score an answer by rule: `text`, and `cut`; one that was cut at the limit states nothing."""
        prediction = parse_answer(question.task, row["text"], row["cut"])
        rule = max(rule_score(question.task, prediction, answer) for answer in (question.answer, *question.aliases))
        return cls(prediction, rule, row["cut"], row.get("prompt_cut", False), row.get("tokens"))

    @property
    def score(self) -> int:
        """max(rule, judge); a judgment that cannot be read counts as no."""
        return max(self.rule, int(self.verdict == 1))


def needs_judgment(question: BenchmarkQuestion, sample: Sample, judge_all: bool) -> bool:
    """Whether a judge can change the score, or (`judge_all`) agree with it. Letters are a matter of rule alone."""
    return sample.prediction is not None and answer_kind(question.task) != "letter" and (judge_all or not sample.rule)


@dataclass
class Answered:
    """A question with its samples."""

    question: BenchmarkQuestion
    samples: list[Sample] = field(default_factory=list)

    def pass_at(self, k: int, measure: str) -> float:
        return pass_at_k(len(self.samples), sum(getattr(sample, measure) for sample in self.samples), k)


def estimates(sets: Sequence[tuple[float, Sequence[Answered]]], measure: str) -> dict[str, dict[str, float]]:
    """pass@k with a 95 % interval of a weighted mean over sets of questions: {"pass@1": {mean, low, high}, ...}.

    k are the powers of two up to the number of samples, and that number. pass@k of a question is the unbiased
    estimate 1 - C(n - c, k) / C(n, k) (paper, Eq. 11). The interval is made of percentiles of bootstrap resamples:
    the questions of each set are drawn with replacement, their samples stay. It is about which questions are asked,
    and where all questions of a set score the same it has no width, whatever their number.

    Args:
        sets: (weight, questions); the weights add up to 1.
        measure: `score` or `rule`.
    """
    n = min(len(answered.samples) for _, members in sets for answered in members)
    ks = sorted({2**power for power in range(n.bit_length())} | {n})
    rng = np.random.default_rng(0)
    mean, drawn = np.zeros(len(ks)), np.zeros((RESAMPLES, len(ks)))
    for weight, members in sets:
        values = np.array([[answered.pass_at(k, measure) for k in ks] for answered in members])
        counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
        mean += weight * values.mean(0)
        drawn += weight * (counts @ values / len(values))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        f"pass@{k}": {"mean": float(mean[i]), "low": float(low[i]), "high": float(high[i])} for i, k in enumerate(ks)
    }


def summarise(answered: Mapping[str, Sequence[Answered]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of an evaluation, as they are written to scores.json.

    Args:
        answered: questions of every benchmark, each with equally many samples.
        settings: what the numbers depend on.
    """
    benchmarks = {name: _benchmark(members) for name, members in answered.items()}
    columns = {
        column: [(1 / len(names), answered[name]) for name in names]
        for column, names in COLUMNS.items()
        if all(name in answered for name in names)
    }
    average = None
    if len(columns) == len(COLUMNS):
        sets = [(weight / len(columns), members) for column in columns.values() for weight, members in column]
        average = {measure: estimates(sets, measure) for measure in MEASURES}
    return {
        "settings": dict(settings),
        "interval": INTERVAL,
        "columns": {
            column: {measure: estimates(sets, measure) for measure in MEASURES} for column, sets in columns.items()
        },
        "average": average,
        "benchmarks": benchmarks,
    }


def _benchmark(members: Sequence[Answered]) -> dict[str, Any]:
    samples = [sample for answered in members for sample in answered.samples]
    lengths = [sample.tokens for sample in samples if sample.tokens is not None]
    subsets = sorted({answered.question.subset for answered in members} - {""})
    parts = {subset: [answered for answered in members if answered.question.subset == subset] for subset in subsets}
    return {
        "questions": len(members),
        "samples": len(members[0].samples),
        **{measure: estimates([(1.0, members)], measure) for measure in MEASURES},
        "subsets": {
            subset: {"questions": len(part), "score": estimates([(1.0, part)], "score")}
            for subset, part in parts.items()
        },
        "judged": sum(sample.verdict is not None for sample in samples),
        "judged_yes": sum(sample.verdict == 1 for sample in samples),
        "judged_unparsable": sum(sample.verdict == UNPARSABLE for sample in samples),
        "answers_cut": fmean(sample.cut for sample in samples),
        "answers_without_statement": fmean(sample.prediction is None for sample in samples),
        "prompts_cut": fmean(answered.samples[0].prompt_cut for answered in members),
        "answer_tokens": fmean(lengths) if lengths else None,
    }
