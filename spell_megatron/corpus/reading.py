"""Files and folders to raw documents."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spell_megatron.errors import UserError
from spell_megatron.files import json_lines

TEXT_SUFFIXES = {".txt", ".md"}
TABLE_SUFFIXES = {".jsonl", ".parquet"}
# Tables with one of these pairs of columns hold clusters already.
CLUSTER_COLUMNS = [{"cluster_id", "documents"}, {"question_id", "paragraphs"}]
_ROWS = 256


@dataclass(frozen=True)
class File:
    """One file to read."""

    path: Path
    name: str
    """How the ids of its documents begin."""
    folder: str = ""
    """Folder whose files make a cluster; "" if none."""

    @property
    def is_table(self) -> bool:
        return self.path.suffix.lower() in TABLE_SUFFIXES


@dataclass(frozen=True)
class Document:
    """One text with where it came from; `folder` is empty unless its folder makes a cluster."""

    id: str
    text: str
    folder: str = ""


@dataclass
class Counts:
    """What reading has found."""

    files: int = 0
    """Files read."""
    documents: int = 0
    """Documents in these files, also those left out. A long document that is cut counts once."""
    pieces: int = 0
    """More documents that came from cutting long ones."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    skipped_files: Counter[str] = field(default_factory=Counter)
    """Files left out, by reason."""
    notes: list[str] = field(default_factory=list)
    """One line per file that needs attention."""


def find_files(inputs: Sequence[Path], written: Sequence[Path], counts: Counts) -> list[File]:
    """Files to read, in a fixed order. Hidden files, and the files `written` by us, are left out."""
    found: list[File] = []
    taken = {path.resolve() for path in written}
    several = sum(path.is_dir() for path in inputs) > 1
    for given in inputs:
        if given.is_dir():
            inside = _walk(given, Path(given.name) if several else Path(), counts)
        else:
            inside = iter([(given, given.name if len(inputs) == 1 else str(given), "")])
        for path, name, folder in inside:
            if path.resolve() not in taken:
                taken.add(path.resolve())
                found += _file(path, _printable(name), _printable(folder), counts)
    return found


def _walk(root: Path, prefix: Path, counts: Counts) -> Iterator[tuple[Path, str, str]]:
    """(path, name, folder that makes a cluster or "") of the files below a folder.

    Args:
        prefix: how names and folders begin, because two inputs may hold folders of the same name.
    """

    def unreadable(error: OSError) -> None:
        counts.skipped_files["unreadable folders"] += 1
        counts.notes.append(f"{_printable(error.filename)}: {error.strerror}")

    for where, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(where).relative_to(root)
        folder = "" if inside == Path() else (prefix / inside).as_posix()
        for name in sorted(name for name in names if not name.startswith(".")):
            if inside == Path() and subfolders and Path(name).stem.upper() == "README":
                counts.skipped_files["README beside sub-folders"] += 1
            else:
                yield Path(where) / name, (prefix / inside / name).as_posix(), folder


def _file(path: Path, name: str, folder: str, counts: Counts) -> list[File]:
    """The file to read, if it is one in a format that is read here."""
    if not path.is_file():
        counts.skipped_files["broken links and special files"] += 1
        return []
    suffix = _extension(path)
    if suffix in TABLE_SUFFIXES:
        return [File(path, name)]
    if suffix in TEXT_SUFFIXES or not suffix:
        return [File(path, name, folder)]
    counts.skipped_files[f"{_printable(suffix)} (not a format read here)"] += 1
    return []


def read_documents(
    file: File, text_column: str, quality_column: str, min_quality: float, counts: Counts
) -> Iterator[Document]:
    """The documents of a text file or a table, which are counted. Documents below the least quality are left out.

    Raises:
        UserError: a table without one of the columns, or damaged.
    """
    if not file.is_table:
        counts.documents += 1
        text = _read_text(file.path, counts)
        if text is not None:
            yield Document(file.name, text, file.folder)
        return
    bad = 0
    columns = [text_column] + ([quality_column] if quality_column else [])
    for number, row in table_rows(file.path, columns):
        counts.documents += 1
        if not isinstance(row, dict):
            bad += 1
            counts.skipped["not a JSON object"] += 1
            continue
        if not isinstance(row.get(text_column), str):
            counts.skipped[f"without a text in {text_column!r}"] += 1
        elif quality_column and not _reaches(row.get(quality_column), min_quality):
            counts.skipped[f"with {quality_column} below {min_quality:g}"] += 1
        else:
            yield Document(f"{file.name}:{number}", row[text_column])
    if bad:
        counts.notes.append(f"{_printable(file.path)}: {bad} lines are not JSON objects")


def _reaches(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not math.isnan(value) and value >= least


def _printable(path: object) -> str:
    """The name of a file, whose bytes need not be UTF-8, as valid text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _extension(path: Path) -> str:
    """`.txt` of `a.TXT`; nothing for `GPL-3` and `Apache-2.0`, whose last part is a version number."""
    return path.suffix.lower() if re.search(r"[A-Za-z]", path.suffix) else ""


def _read_text(path: Path, counts: Counts) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        counts.documents -= 1
        counts.skipped_files["unreadable"] += 1
        counts.notes.append(f"{_printable(path)}: {error.strerror}")
        return None
    text = data.decode("utf-8-sig", errors="replace")
    bad = text.count("\ufffd")
    if b"\0" in data or bad > max(10, len(text) // 100):
        counts.documents -= 1
        counts.skipped_files["not UTF-8 text"] += 1
        counts.notes.append(f"{_printable(path)}: not UTF-8 text, left out; convert it with iconv")
        return None
    if bad:
        counts.notes.append(f"{_printable(path)}: bytes that are not UTF-8: {bad}, replaced by U+FFFD")
    return text


def table_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, object]]:
    """(number from 1, row) of a .jsonl or .parquet file, read piece by piece.

    In .jsonl the numbers count lines, and a line that is not JSON gives None. In .parquet they count rows.

    Args:
        columns: the columns to read, which must be there; all if empty.

    Raises:
        UserError: if the file cannot be read, is damaged, or lacks a column.
    """
    if path.suffix.lower() == ".parquet":
        table = _parquet(path)
        _check_columns(path, columns, table.schema_arrow.names)
        number = 0
        try:
            for batch in table.iter_batches(batch_size=_ROWS, columns=list(columns) or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged after row {number} ({error}). Write the file again.") from error
        return
    # Lines need not have all columns, but some line must have each.
    found: dict[str, None] = {}
    objects = 0
    for number, row in _json_lines(path):
        if isinstance(row, dict) and objects < _ROWS:
            found |= dict.fromkeys(row)
            objects += 1
            if objects == _ROWS:
                _check_columns(path, columns, found, f" in the first {_ROWS} lines")
        yield number, row
    if 0 < objects < _ROWS:
        _check_columns(path, columns, found)


def holds_clusters(path: Path) -> bool:
    """Whether the rows of a table are clusters, not documents."""
    if path.suffix.lower() == ".parquet":
        columns = set(_parquet(path).schema_arrow.names)
    else:
        columns = set(next((row for _, row in _json_lines(path) if isinstance(row, dict)), ()))
    return any(pair <= columns for pair in CLUSTER_COLUMNS)


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}).") from error


def _check_columns(path: Path, wanted: Iterable[str], columns: Iterable[str], where: str = "") -> None:
    columns = list(columns)
    if missing := [name for name in wanted if name not in columns]:
        raise UserError(
            f"{path}: there is no column {missing[0]!r}{where}. The columns are {', '.join(columns)}. Name the one "
            "that holds the text with --text-column and the one of a quality score, if any, with --quality-column "
            "(or give the table the columns cluster_id and documents if its rows are clusters)."
        )


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of each line that is not blank; None for lines that are not JSON."""
    try:
        for number, value, _ in json_lines(path):
            yield number, value
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Make the file readable or leave it out.") from error
