"""The results of an evaluation as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spell_megatron.evaluation.results import COLUMNS
from spell_megatron.plural import counted


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
            f"{settings['temperature']:g}, top-p {settings['top_p']:g}, "
            f"{counted(settings['samples'], 'sample')} a question. "
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
