"""From answers to numbers: scores of samples, pass@k with intervals, the paper's table, JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.judge import UNPARSABLE
from spell_megatron.evaluation.scores import pass_at_k
from spell_megatron.files import write_text
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


@dataclass
class Sample:
    """One answer. `prediction` is what it states, if anything; `verdict` the judge's (see `judge`), None: not asked."""

    prediction: str | None
    rule: int
    cut: bool
    prompt_cut: bool
    tokens: int | None
    verdict: int | None = None

    @classmethod
    def of(cls, question: BenchmarkQuestion, row: Mapping[str, Any]) -> Sample:
        """Score an answer by rule: `text`, and `cut`; one that was cut at the limit states nothing."""
        prediction = parse_answer(question.task, row["text"], row["cut"])
        rule = rule_score(question.task, prediction, question.answer)
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
    estimate 1 - C(n - c, k) / C(n, k) (paper, Eq. 11). The interval is that of percentiles of bootstrap resamples:
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


# ------------------------------------------------------------------------------------------ writing


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write scores.json, scores.md and pass_at_k.svg; each appears when it is complete. Returns the files."""
    contents = {
        "scores.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "scores.md": markdown(results),
        "pass_at_k.svg": plot(results),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "–"
    return f"{100 * estimate['mean']:.1f} ({100 * estimate['low']:.1f}–{100 * estimate['high']:.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown(results: Mapping[str, Any]) -> str:
    """The results as Markdown; percentages, with their intervals in brackets."""
    settings, columns, average = results["settings"], results["columns"], results["average"]
    judge = settings.get("judge")
    lines = [
        f"# Evaluation of {settings['model']}",
        "",
        (
            f"Input limit {settings['max_input']:,} tokens, output {settings['max_output']:,}, temperature "
            f"{settings['temperature']:g}, top-p {settings['top_p']:g}, {settings['samples']} samples a question. "
            if "max_input" in settings
            else ""
        )
        + "Scores: "
        + (f"the better of rule and judge ({judge})." if judge else "rule alone; there was no judge."),
        f"In brackets: {results['interval']}.",
        "",
    ]
    if columns:
        rows = []
        for measure, title in (("score", "{}"), ("rule", "{}, rule alone")):
            if measure == "rule" and not judge:
                continue
            for k in next(iter(columns.values()))[measure]:
                cells = [_cell(columns[c][measure].get(k)) if c in columns else "–" for c in COLUMNS]
                rows.append([title.format(k), *cells, _cell(average[measure].get(k) if average else None)])
        lines += _table(["", *COLUMNS, "Avg"], rows)
        if average is None:
            missing = ", ".join(column for column in COLUMNS if column not in columns)
            lines += ["", f"No average: it needs all four columns; missing: {missing}."]
        lines.append("")
    rows = []
    for name, about in results["benchmarks"].items():
        last = list(about["score"])[-1]
        rows.append(
            [
                name,
                f"{about['questions']:,}",
                _cell(about["score"]["pass@1"]),
                f"{last} {_cell(about['score'][last])}",
                f"{100 * about['rule']['pass@1']['mean']:.1f}",
                f"{about['judged']:,} / {about['judged_yes']:,} / {about['judged_unparsable']:,}",
                f"{about['answers_without_statement']:.1%}",
                f"{about['answers_cut']:.1%}",
                f"{about['prompts_cut']:.1%}",
                "–" if about["answer_tokens"] is None else f"{about['answer_tokens']:,.0f}",
            ]
        )
        rows += [
            [f"– {subset}", f"{part['questions']:,}", _cell(part["score"]["pass@1"]), *[""] * 7]
            for subset, part in about["subsets"].items()
        ]
    head = ["benchmark", "questions", "pass@1", "all samples", "rule", "judged / yes / unparsable"]
    head += ["no answer", "answers cut", "prompts cut", "tokens"]
    return "\n".join([*lines, *_table(head, rows), ""])


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")


def plot(results: Mapping[str, Any]) -> str:
    """pass@k over k with intervals, as an SVG: the average, the columns, and benchmarks that belong to none."""
    in_columns = {name for column in results["columns"] for name in COLUMNS[column]}
    curves = {name: about["score"] for name, about in results["benchmarks"].items() if name not in in_columns}
    curves = {column: about["score"] for column, about in results["columns"].items()} | curves
    if results["average"]:
        curves = {"Avg": results["average"]["score"]} | curves
    ks = sorted({int(k.removeprefix("pass@")) for curve in curves.values() for k in curve})
    width, height, left, top, right, bottom = 640, 400, 50, 20, 150, 45
    step = (width - left - right) / max(1, len(ks) - 1)

    def x(k: int) -> float:
        return left + step * ks.index(k)

    def y(share: float) -> float:
        return top + (height - top - bottom) * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<path d="M{left} {at:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{percent}%</text>')
    parts += [f'<text x="{x(k):.1f}" y="{height - bottom + 18}" text-anchor="middle">{k}</text>' for k in ks]
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">k of pass@k</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [(int(k.removeprefix("pass@")), estimate) for k, estimate in curve.items()]
        offset = 2 * (number - len(curves) / 2)  # so that bars do not hide each other
        line = " ".join(f"{x(k) + offset:.1f},{y(e['mean']):.1f}" for k, e in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for k, e in points:
            at = x(k) + offset
            parts.append(f'<path d="M{at:.1f} {y(e["low"]):.1f}V{y(e["high"]):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(e["mean"]):.1f}" r="3" fill="{colour}"/>')
        label = top + 14 + 18 * number
        parts.append(f'<rect x="{width - right + 16}" y="{label - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{width - right + 32}" y="{label}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])
