"""The paper's benchmarks, read from the Hugging Face hub or from local files of the same formats.

Rows become questions in the form that the responder was trained on: DocMath-Eval numbers, Frames, 2WikiMultihopQA,
HotpotQA and MuSiQue (of LongBench) short texts, LongBench-v2 option letters. Nothing of a data set is executed.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.evaluation.heldout import HeldOutQuestion, load_questions
from spell_megatron.selfplay.documents import answer_text, valid_unicode
from spell_megatron.selfplay.parsing import LETTERS, choice_text


@dataclass(frozen=True)
class BenchmarkQuestion(HeldOutQuestion):
    """A question of a benchmark. `id` is unique in the benchmark; `subset` is a part that it is reported by, or ""."""

    benchmark: str
    subset: str = ""


@dataclass(frozen=True)
class _Format:
    """Where a benchmark is and how its rows are read.

    Attributes:
        repository: data set of the hub.
        download: patterns of the files to fetch from it.
        files: regular expression of the files (paths in a folder or zip archive) that hold its rows.
        read: (row, number of questions before it, name of its file) -> question. It raises `_Fault`.
        parts: names that must each occur in one of the files, if a folder holds them.
    """

    repository: str
    download: tuple[str, ...]
    files: str
    read: Callable[[Mapping[str, Any], int, str], BenchmarkQuestion]
    parts: tuple[str, ...] = ()


class _Fault(Exception):
    """A row is not of its benchmark's format."""


def load_benchmark(name: str, path: Path | None = None, limit: int | None = None) -> list[BenchmarkQuestion]:
    """Questions of a benchmark, in the order of its files.

    Args:
        name: one of `BENCHMARKS`, or any other name for questions of one's own.
        path: file (.json, .jsonl, .parquet; .zip for LongBench's archive) or folder with the files that the hub
            has; None: fetch them from the hub. For other names a JSONL file as `heldout.load_questions` reads it.
        limit: only the first ones.

    Raises:
        UserError: the hub or the file cannot be read, or rows lack fields: the first ten are named.
    """
    if path and not path.exists():
        raise UserError(f"There is no file or folder {path} for the benchmark {name}. Correct --benchmark {name}=PATH.")
    if name not in BENCHMARKS:
        if path is None:
            known = ", ".join(BENCHMARKS)
            raise UserError(
                f"{name!r} is no benchmark that is known here ({known}). For questions of your own give their "
                f"file: --benchmark {name}=FILE."
            )
        own = [BenchmarkQuestion(**vars(question), benchmark=name) for question in load_questions(path)]
        return _unique(own)[:limit]
    form = BENCHMARKS[name]
    path = _fetch(name, form) if path is None else path
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _holds(form, file.relative_to(path).as_posix()))
        missing = [part for part in form.parts if not any(part in file.name for file in files)]
        if not files and (archive := path / "data.zip").is_file():  # as LongBench's repository is
            files = [archive]
        elif missing or not files:
            raise UserError(
                f"The folder {path} lacks files of {name}: none is named like {form.files}"
                + (f" for {', '.join(missing)}" if missing else "")
                + f". Fetch them from the data set {form.repository} of the hub, or name a single file."
            )
    questions, faults = [], []
    origin: dict[tuple[str, str, tuple[str, ...]], Path] = {}
    for file in files:
        for number, (where, row) in enumerate(_rows(name, form, file), start=1):
            try:
                question = form.read(row, len(questions), where)
            except _Fault as fault:
                faults.append(f"row {number} of {where}: {fault}")
                continue
            other = origin.setdefault((question.question, question.answer, question.documents), file)
            if other != file:
                raise UserError(
                    f"{path} holds the same questions twice, in {other.relative_to(path)} and in "
                    f"{file.relative_to(path)}. Name one of the files, or remove one."
                )
            questions.append(question)
    if faults or not questions:
        detail = "; ".join(faults[:10]) or "there are no rows"
        more = f" (and {len(faults) - 10} more)" if len(faults) > 10 else ""
        raise UserError(
            f"{path} cannot be used as {name}: {detail}{more}. Its rows must be those of the data set "
            f"{form.repository}; docs/evaluation.md lists the fields."
        )
    return _unique(questions)[:limit]


def _unique(questions: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """The same questions, of which those whose id occurred before have a number behind it that makes a new one."""
    given = {question.id for question in questions}
    seen: Counter[str] = Counter()
    result = []
    for question in questions:
        key = question.id
        seen[key] += 1
        if seen[key] > 1:
            while (unused := f"{key}#{seen[key]}") in given:
                seen[key] += 1
            question = replace(question, id=unused)
        result.append(question)
    return result


# ------------------------------------------------------------------------------------------- files


def _fetch(name: str, form: _Format) -> Path:
    """The folder of the benchmark's files in the hub's local cache, fetched if they are not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"https://huggingface.co/datasets/{form.repository}"
    remedy = f"Or fetch its files elsewhere ({page}) and name them: --benchmark {name}=FILE_OR_FOLDER."
    try:
        return Path(snapshot_download(form.repository, repo_type="dataset", allow_patterns=list(form.download)))
    except GatedRepoError as error:
        raise UserError(
            f"The hub gives {form.repository} only to those who accepted its conditions. Accept them at {page}, make "
            f"a token there, and set HF_TOKEN to it. {remedy}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no data set {form.repository} (any more), or HF_TOKEN is wrong. {remedy}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} ({form.repository}) cannot be fetched from the Hugging Face hub: {_first_line(error)} If this "
            f"machine has no network, run once where there is one with the same HF_HOME. {remedy}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _holds(form: _Format, path: str) -> bool:
    return re.search(form.files, path, re.IGNORECASE) is not None


def _rows(name: str, form: _Format, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file, row) of a .json, .jsonl or .parquet file, or of those that a .zip archive holds of the benchmark."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.namelist() if _holds(form, member)]
                if not members:
                    raise ValueError(f"it holds no file named like {form.files}")
                for member in members:
                    with archive.open(member) as file:
                        yield from ((member, row) for row in _json_rows(member, io.TextIOWrapper(file, "utf-8-sig")))
        elif suffix == ".parquet":
            import pyarrow.parquet as parquet

            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                yield from ((path.name, row) for row in batch.to_pylist())
        elif suffix in (".json", ".jsonl"):
            with path.open(encoding="utf-8-sig") as file:
                yield from ((path.name, row) for row in _json_rows(path.name, file))
        else:
            raise ValueError("it is none of .json, .jsonl, .parquet and .zip")
    # pyarrow's errors are ValueErrors and OSErrors
    except (ValueError, RecursionError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as {name}: {error}. Fetch it again, or name another file with --benchmark "
            f"{name}=PATH."
        ) from error


def _json_rows(name: str, file: io.TextIOBase) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSON list, or of a file with one JSON object a line (whichever its name says it is)."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start == "[":
        rows = json.load(file)
    else:
        rows = (_parse_line(line, number) for number, line in enumerate(file, start=1) if line.strip())
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {name} is no JSON object")
        yield row


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is no JSON ({error})") from error


# -------------------------------------------------------------------------------------------- rows


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _Fault(f"no text in the field {field!r}{_absent(row, field)}")
    return valid_unicode(value).strip()


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
        raise _Fault(f"the field 'paragraphs' is no list of texts{_absent(row, 'paragraphs')}")
    # A truth value is no number: only a judge can find it in an answer.
    answer = str(truth) if isinstance(truth, bool) else _answer(row, "ground_truth")
    documents = tuple(map(valid_unicode, paragraphs))
    return BenchmarkQuestion(key, "docmath_qa", _text(row, "question"), answer, documents, "docmath", part)


def _frames(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
    items = row.get("wiki_items")
    if isinstance(items, str):  # tables keep the list as JSON
        try:
            items = json.loads(items)
        except ValueError:
            items = None
    if (
        not isinstance(items, list)
        or not all(isinstance(item, dict) for item in items)
        or not any(item.get("text") for item in items)  # of some articles it may be missing
    ):
        raise _Fault(f"the field 'wiki_items' is no list of articles with title and text{_absent(row, 'wiki_items')}")
    documents = tuple(valid_unicode(f"{item.get('title') or ''}\n{item.get('text') or ''}") for item in items)
    question, answer = _text(row, "Prompt"), _answer(row, "Answer")
    return BenchmarkQuestion(f"frames-{number}", "doc_general_qa", question, answer, documents, "frames")


def _longbench(name: str) -> Callable[[Mapping[str, Any], int, str], BenchmarkQuestion]:
    def read(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
        if row.get("dataset", name) not in (name, f"{name}_e"):
            raise _Fault(f"it is a row of {row['dataset']!r}")
        key = str(row.get("_id") or f"{name}-{number}")
        answers = row.get("answers")
        answer = answer_text(answers[0] if isinstance(answers, list) and answers else answers)
        if not answer:
            raise _Fault(f"the field 'answers' is no list of texts, or the first is empty{_absent(row, 'answers')}")
        return BenchmarkQuestion(key, "doc_general_qa", _text(row, "input"), answer, (_text(row, "context"),), name)

    return read


def _longbench_v2(row: Mapping[str, Any], number: int, file: str) -> BenchmarkQuestion:
    answer = _text(row, "answer").upper()
    if answer not in tuple(LETTERS):
        raise _Fault(f"the answer {answer!r} is none of A, B, C and D")
    question = choice_text(_text(row, "question"), [_text(row, f"choice_{letter}") for letter in LETTERS])
    key = str(row.get("_id") or f"longbench-v2-{number}")
    subset = str(row.get("length") or "")
    return BenchmarkQuestion(key, "doc_mc", question, answer, (_text(row, "context"),), "longbench-v2", subset)


def _of_longbench(name: str) -> _Format:
    # data/hotpotqa.jsonl, hotpotqa-00000-of-00001.parquet, hotpotqa/test/0000.parquet; not the sets named ..._e
    files = rf"(^|/){name}([-./][^/]*|/.*/[^/]*)?\.(jsonl?|parquet)$"
    return _Format("THUDM/LongBench", ("data.zip",), files, _longbench(name))


BENCHMARKS = {
    "docmath": _Format(
        "yale-nlp/DocMath-Eval",
        ("*testmini*",),
        r"(complong|compshort|simplong|simpshort)[-_]testmini[^/]*\.(jsonl?|parquet)$",
        _docmath,
        _DOCMATH_PARTS,
    ),
    "frames": _Format("Tongyi-Zhiwen/frames", ("*test*",), r"(^|/)[^/]*test[^/]*\.(jsonl?|parquet)$", _frames),
    "2wikimqa": _of_longbench("2wikimqa"),
    "hotpotqa": _of_longbench("hotpotqa"),
    "musique": _of_longbench("musique"),
    "longbench-v2": _Format(
        "THUDM/LongBench-v2", ("data.json",), r"(^|/)(data|train[^/]*)\.(jsonl?|parquet)$", _longbench_v2
    ),
}
"""The benchmarks of the paper, by the names of `spell evaluate --benchmark`."""
