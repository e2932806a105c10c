"""Rows of the tables that a corpus is made of: JSON lines and parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from spell_megatron.errors import UserError
from spell_megatron.files import json_lines
from spell_megatron.parquet import DamagedError, column_names, parquet_rows

# Tables with one of these pairs of columns hold clusters already.
CLUSTER_COLUMNS = [{"cluster_id", "documents"}, {"question_id", "paragraphs"}]
_ROWS = 256


class UnusableFile(UserError):
    """A file that cannot be used, or not further; `kind` says in few words why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class LacksColumn(UnusableFile):
    """A table without a column that an option names."""


def table_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, object, str]]:
    """(number from 1, row, fault) of a .jsonl or .parquet file, read piece by piece.

    In .jsonl the numbers count lines, and a line that is not JSON gives None. In .parquet they count rows, and bytes
    that are not UTF-8 are U+FFFD in the row. In both cases the fault says so.

    Args:
        columns: the columns to read, which must be there; all if empty.

    Raises:
        UnusableFile: if the file cannot be read, is damaged, or lacks a column.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    # Lines need not have all columns, but some line must have each.
    found: dict[str, None] = {}
    objects = 0
    try:
        for number, row, fault in json_lines(path):
            if isinstance(row, dict) and objects < _ROWS:
                found |= dict.fromkeys(row)
                objects += 1
                if objects == _ROWS:
                    _check_columns(path, columns, found, f" in the first {_ROWS} lines")
            yield number, row, f"line {number} {fault}" if fault else ""
    except OSError as error:
        raise UnusableFile("unreadable", f"{path}: {error.strerror}. Make it readable or leave it out.") from error
    if 0 < objects < _ROWS:
        _check_columns(path, columns, found)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, object, str]]:
    try:
        _check_columns(path, columns, column_names(path))
        for number, row, wrong in parquet_rows(path, columns):
            where = ", ".join(map(repr, wrong))
            yield number, row, f"row {number} holds bytes that are not UTF-8 in {where}, now U+FFFD" if wrong else ""
    except DamagedError as error:
        raise UnusableFile("damaged", f"{path}: {error}. Write the file again.") from error


def holds_clusters(path: Path) -> bool:
    """Whether the rows of a table are clusters, not documents.

    Raises:
        UnusableFile: it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        try:
            columns = set(column_names(path))
        except DamagedError as error:
            raise UnusableFile("damaged", f"{path}: {error}. Write the file again.") from error
    else:
        columns = set(next((row for _, row, _ in table_rows(path) if isinstance(row, dict)), ()))
    return any(pair <= columns for pair in CLUSTER_COLUMNS)


def _check_columns(path: Path, wanted: Iterable[str], columns: Iterable[str], where: str = "") -> None:
    columns = list(columns)
    if missing := [name for name in wanted if name not in columns]:
        raise LacksColumn(
            f"without a column {missing[0]!r}",
            f"{path}: there is no column {missing[0]!r}{where}. The columns are {', '.join(columns)}. Name the one "
            "that holds the text with --text-column and the one of a quality score, if any, with --quality-column "
            "(or give the table the columns cluster_id and documents if its rows are clusters).",
        )
