"""The paper's benchmarks: where each one is, and how its rows become questions. To add one, add it to `BENCHMARKS`.

Questions have the form that the responder was trained on: DocMath-Eval numbers, Frames, 2WikiMultihopQA,
HotpotQA and MuSiQue (of LongBench) short texts, LongBench-v2 option letters. Nothing of a data set is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from spell_megatron.evaluation.questions import HeldOutQuestion
from spell_megatron.selfplay.letters import LETTERS
from spell_megatron.selfplay.parsing import choice_text
from spell_megatron.selfplay.references import answer_text, valid_unicode


@dataclass(frozen=True)
class BenchmarkQuestion(HeldOutQuestion):
    """A question of a benchmark. `id` is unique in the benchmark; `subset` is a part that it is reported by, or ""."""

    benchmark: str
    subset: str = ""


@dataclass(frozen=True)
class Format:
    """Where a benchmark is and how its rows are read.

    Attributes:
        repository: data set of the hub.
        download: patterns of the files to fetch from it.
        files: regular expression of the files (paths in a folder or zip archive) that hold its rows.
        read: (row, number of questions before it, name of its file) -> question. It raises `RowFault`.
        parts: names that must each occur in one of the files, if a folder holds them.
    """

    repository: str
    download: tuple[str, ...]
    files: str
    read: Callable[[Mapping[str, Any], int, str], BenchmarkQuestion]
    parts: tuple[str, ...] = ()


class RowFault(Exception):
    """A row is not of its benchmark's format."""


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise RowFault(f"no text in the field {field!r}{_absent(row, field)}")
    return valid_unicode(value).strip()


def _wrong(row: Mapping[str, Any], field: str, what: str) -> RowFault:
    return RowFault(f"the field {field!r} {what}{_absent(row, field)}")


def _absent(row: Mapping[str, Any], field: str) -> str:
    return "" if field in row else " (there is no such field)"


def _answer(row: Mapping[str, Any], field: str) -> str:
    return answer_text(row.get(field)) or _text(row, field)


_DOCMATH_PARTS = ("complong", "compshort", "simplong", "simpshort")


def _docmath(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
    name = f"{row.get('question_id') or ''} {PurePosixPath(file).name}"  # ids begin with the split's name
    part = next((part for part in _DOCMATH_PARTS if part in name), "")
    key = str(row.get("question_id") or f"{part or 'docmath'}-{number}")
    paragraphs, truth = row.get("paragraphs"), row.get("ground_truth")
    if not isinstance(paragraphs, list) or not paragraphs or not all(isinstance(text, str) for text in paragraphs):
        raise _wrong(row, "paragraphs", "is not a list of texts")
    # A truth value is not a number: only a judge can find it in an answer.
    answer = str(truth) if isinstance(truth, bool) else _answer(row, "ground_truth")
    documents = tuple(map(valid_unicode, paragraphs))
    return BenchmarkQuestion(key, "docmath_qa", _text(row, "question"), answer, documents, "docmath", part)


def _frames(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
    items = row.get("wiki_items")
    if isinstance(items, str):  # tables keep the list as JSON
        try:
            items = json.loads(items)
        except (ValueError, RecursionError):
            items = None
    if (
        not isinstance(items, list)
        or not all(isinstance(item, dict) for item in items)
        or not any(item.get("text") for item in items)  # of some articles it may be missing
    ):
        raise RowFault(
            f"the field 'wiki_items' is not a list of articles with title and text{_absent(row, 'wiki_items')}"
        )
    documents = tuple(valid_unicode(f"{item.get('title') or ''}\n{item.get('text') or ''}") for item in items)
    question, answer = _text(row, "Prompt"), _answer(row, "Answer")
    return BenchmarkQuestion(f"frames-{number}", "doc_general_qa", question, answer, documents, "frames")


def _longbench(name: str) -> Callable[[Mapping[str, Any], int, str], BenchmarkQuestion]:
    def read(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
        if row.get("dataset", name) not in (name, f"{name}_e"):
            raise RowFault(f"it is a row of {row['dataset']!r}")
        key = str(row.get("_id") or f"{name}-{number}")
        answers = row.get("answers")
        answer, *others = map(answer_text, answers if isinstance(answers, list) and answers else [answers])
        if not answer:
            raise RowFault(
                f"the field 'answers' is not a list of texts, or the first is empty{_absent(row, 'answers')}"
            )
        question, documents, aliases = _text(row, "input"), (_text(row, "context"),), tuple(filter(None, others))
        return BenchmarkQuestion(key, "doc_general_qa", question, answer, documents, name, aliases=aliases)

    return read


def _longbench_v2(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
    answer = _text(row, "answer").upper()
    if answer not in tuple(LETTERS):
        raise RowFault(f"the answer {answer!r} is none of A, B, C and D")
    question = choice_text(_text(row, "question"), [_text(row, f"choice_{letter}") for letter in LETTERS])
    key = str(row.get("_id") or f"longbench-v2-{number}")
    subset = str(row.get("length") or "")
    return BenchmarkQuestion(key, "doc_mc", question, answer, (_text(row, "context"),), "longbench-v2", subset)


def _of_longbench(name: str) -> Format:
    # data/hotpotqa.jsonl, hotpotqa-00000-of-00001.parquet, hotpotqa/test/0000.parquet; not the sets named ..._e
    files = rf"(^|/){name}([-./][^/]*|/.*/[^/]*)?\.(jsonl?|parquet)$"
    return Format("THUDM/LongBench", ("data.zip",), files, _longbench(name))


BENCHMARKS = {
    "docmath": Format(
        "yale-nlp/DocMath-Eval",
        ("*testmini*",),
        r"(complong|compshort|simplong|simpshort)[-_]testmini[^/]*\.(jsonl?|parquet)$",
        _docmath,
        _DOCMATH_PARTS,
    ),
    "frames": Format("Tongyi-Zhiwen/frames", ("*test*",), r"(^|/)[^/]*test[^/]*\.(jsonl?|parquet)$", _frames),
    "2wikimqa": _of_longbench("2wikimqa"),
    "hotpotqa": _of_longbench("hotpotqa"),
    "musique": _of_longbench("musique"),
    "longbench-v2": Format(
        "THUDM/LongBench-v2", ("data.json",), r"(^|/)(data|train[^/]*)\.(jsonl?|parquet)$", _longbench_v2
    ),
}
"""The benchmarks of the paper, by the names of `spell evaluate --benchmark`."""
