"""Questions of a benchmark, from the Hugging Face hub or from local files of the same formats."""

from __future__ import annotations

import codecs
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from spell_megatron.encodings import ZIP_FAULTS, utf8_stream
from spell_megatron.errors import UserError
from spell_megatron.evaluation.benchmarks import BENCHMARKS, BenchmarkQuestion, Format, RowFault
from spell_megatron.evaluation.questions import load_questions
from spell_megatron.files import MAX_FAULTS, parse_json_lines
from spell_megatron.folders import is_left_behind, walk
from spell_megatron.hub import fetch_files
from spell_megatron.parquet import parquet_rows
from spell_megatron.selfplay.references import valid_unicode


def load_benchmark(name: str, path: Path | None = None, limit: int | None = None) -> list[BenchmarkQuestion]:
    """Questions of a benchmark, in the order of its files.

    Args:
        name: one of `BENCHMARKS`, or any other name for questions of one's own.
        path: file (.json, .jsonl, .parquet; .zip for LongBench's archive) or folder with the files that the hub
            has; None: fetch them from the hub. For other names a JSONL file as `questions.load_questions` reads it.
        limit: only the first ones.

    Raises:
        UserError: the hub or the file cannot be read, or rows lack fields: the first ten are named.
    """
    if path and not path.exists():
        raise UserError(f"There is no file or folder {path} for the benchmark {name}. Correct --benchmark {name}=PATH.")
    if name not in BENCHMARKS:
        return _own_questions(name, path)[:limit]
    form = BENCHMARKS[name]
    path = _fetch(name, form) if path is None else path
    questions = _read(name, form, path, _files(name, form, path))
    return _unique(questions)[:limit]


def _own_questions(name: str, path: Path | None) -> list[BenchmarkQuestion]:
    if path is None:
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"There is no benchmark {name!r} ({known} are known). For questions of your own give their file: "
            f"--benchmark {name}=FILE."
        )
    return _unique([BenchmarkQuestion(**vars(question), benchmark=name) for question in load_questions(path)])


def _files(name: str, form: Format, path: Path) -> list[Path]:
    """The file itself, or the files of a folder that hold the benchmark's rows."""
    if not path.is_dir():
        return [path]
    below = (folder.path / name for folder in walk(path) for name in folder.files)
    files = sorted(file for file in below if _holds(form, file.relative_to(path).as_posix()))
    if not files and (archive := path / "data.zip").is_file():  # as LongBench's repository is
        return [archive]
    missing = [part for part in form.parts if not any(part in file.name for file in files)]
    if missing or not files:
        raise UserError(
            f"The folder {path} lacks files of {name}: none is named like {form.files}"
            + (f" for {', '.join(missing)}" if missing else "")
            + f". Fetch them from the data set {form.repository} of the hub, or name a single file."
        )
    return files


def _read(name: str, form: Format, path: Path, files: Sequence[Path]) -> list[BenchmarkQuestion]:
    """The questions of a benchmark's files.

    Args:
        path: what the files were found in.

    Raises:
        UserError: rows are not of the benchmark's format, there are none, or two files hold the same question.
    """
    questions: list[BenchmarkQuestion] = []
    faults: list[str] = []
    origin: dict[tuple[str, str, tuple[str, ...]], Path] = {}
    for file in files:
        for number, (where, row) in enumerate(_rows(name, form, file), start=1):
            try:
                question = form.read(row, len(questions), where)
            except RowFault as fault:
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
        detail = "; ".join(faults[:MAX_FAULTS]) or "there are no rows"
        more = f" (and {len(faults) - MAX_FAULTS} more)" if len(faults) > MAX_FAULTS else ""
        raise UserError(
            f"{path} cannot be used as {name}: {detail}{more}. Its rows must be those of the data set "
            f"{form.repository}; docs/evaluation.md lists the fields."
        )
    return questions


def _unique(questions: Sequence[BenchmarkQuestion]) -> list[BenchmarkQuestion]:
    """The same questions with ids that differ: an id that occurred before gets a number behind it."""
    questions = [replace(q, id=valid_unicode(q.id), subset=valid_unicode(q.subset)) for q in questions]
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


def _fetch(name: str, form: Format) -> Path:
    """The folder of the benchmark's files in the hub's local cache, fetched if they are not there."""
    remedy = f"Or fetch the files of {name} elsewhere, and name them: --benchmark {name}=FILE_OR_FOLDER."
    return fetch_files(form.repository, form.download, remedy)


def _holds(form: Format, path: str) -> bool:
    return re.search(form.files, path, re.IGNORECASE) is not None


def _rows(name: str, form: Format, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file, row) of a .json, .jsonl or .parquet file, or of the benchmark's files in a .zip archive."""
    read = {".zip": _zip_rows, ".parquet": _parquet_rows, ".json": _file_rows, ".jsonl": _file_rows}
    try:
        if path.suffix.lower() not in read:
            raise ValueError("it is none of .json, .jsonl, .parquet and .zip")
        yield from read[path.suffix.lower()](form, path)
    except (ValueError, *ZIP_FAULTS) as error:
        raise UserError(
            f"{path} cannot be read as {name}: {error}. Fetch it again, or name another file with --benchmark "
            f"{name}=PATH."
        ) from error


def _zip_rows(form: Format, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if _holds(form, name) and not is_left_behind(name)]
        if not members:
            raise ValueError(f"it holds no file named like {form.files}")
        for member in members:
            with archive.open(member) as file:
                yield from ((member, row) for row in _json_rows(member, file))


def _parquet_rows(form: Format, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row, wrong in parquet_rows(path):
        if wrong:
            raise ValueError(f"row {number} holds bytes that are not UTF-8 in {', '.join(map(repr, wrong))}")
        yield path.name, row


def _file_rows(form: Format, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        yield from ((path.name, row) for row in _json_rows(path.name, file))


def _json_rows(name: str, file: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSON list, or of a file with one JSON object a line (whichever its name says it is)."""
    file = utf8_stream(file)
    start = file.read(1)
    while start and (start.isspace() or start in codecs.BOM_UTF8):
        start = file.read(1)
    file.seek(0)
    rows = json.load(file) if start == b"[" else _lines(file)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {name} is not a JSON object")
        yield row


def _lines(file: Iterable[bytes]) -> Iterator[Any]:
    for number, value, fault in parse_json_lines(file):
        if fault:
            raise ValueError(f"line {number} {fault}")
        yield value
