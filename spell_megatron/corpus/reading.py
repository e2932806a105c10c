"""Files and folders to raw documents."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from spell_megatron.corpus.input_tables import table_rows
from spell_megatron.encodings import packed, printable, utf8
from spell_megatron.folders import walk
from spell_megatron.selfplay.references import shown

TEXT_SUFFIXES = {".txt", ".md"}
TABLE_SUFFIXES = {".jsonl", ".parquet"}


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


def find_files(inputs: Sequence[Path], left_out: Sequence[Path], counts: Counts) -> list[File]:
    """Files to read, in a fixed order. What is hidden or left behind is left out, too."""
    found: list[File] = []
    taken = {os.path.realpath(path) for path in left_out}
    several = sum(path.is_dir() for path in inputs) > 1
    for given in inputs:
        if given.is_dir():
            inside = _below(given, Path(given.name) if several else Path(), counts)
        else:
            inside = iter([(given, given.name if len(inputs) == 1 else str(given), "")])
        for path, name, folder in inside:
            if (real := os.path.realpath(path)) not in taken:
                taken.add(real)
                found += _file(path, printable(name), printable(folder), counts)
    return found


def _below(root: Path, prefix: Path, counts: Counts) -> Iterator[tuple[Path, str, str]]:
    """(path, name, folder that makes a cluster or "") of the files below a folder.

    Args:
        prefix: how names and folders begin, because two inputs may hold folders of the same name.
    """

    def left_out(kind: str, path: Path, why: str) -> None:
        counts.skipped_files[kind] += 1
        counts.notes.append(f"{printable(path)}: {why}")

    for found in walk(root, left_out):
        inside = found.path.relative_to(root)
        folder = "" if inside == Path() else (prefix / inside).as_posix()
        for name in found.files:
            if inside == Path() and found.subfolders and Path(name).stem.upper() == "README":
                counts.skipped_files["README beside sub-folders"] += 1
            else:
                yield found.path / name, (prefix / inside / name).as_posix(), folder


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
    counts.skipped_files[f"{printable(suffix)} (not a format read here)"] += 1
    return []


def read_documents(
    file: File, text_column: str, quality_column: str, min_quality: float, counts: Counts
) -> Iterator[Document]:
    """The documents of a text file or a table, which are counted. Documents below the least quality are left out.

    Raises:
        UnusableFile: a table without one of the columns, or damaged.
    """
    if not file.is_table:
        counts.documents += 1
        text = _read_text(file.path, counts)
        if text is not None:
            yield Document(file.name, text, file.folder)
        return
    columns = [text_column] + ([quality_column] if quality_column else [])
    faults = _Faults()
    try:
        for number, row, fault in table_rows(file.path, columns):
            counts.documents += 1
            faults.note(fault)
            if not isinstance(row, dict):
                counts.skipped["not a JSON object"] += 1
                faults.note("" if fault else f"line {number} is not a JSON object")
                continue
            value: Any = row.get(text_column)
            bad = 0
            if isinstance(value, bytes):  # some programs write texts so
                value, bad = _decoded(value)
                faults.note(
                    f"row {number} holds bytes that are not UTF-8 in {text_column!r}, now U+FFFD" if bad else ""
                )
            elif fault and isinstance(value, str):
                bad = value.count("\ufffd")
            if not isinstance(value, str):
                reason = f"without a text in {text_column!r}"
            elif _is_damaged(value, bad):
                reason = "not UTF-8 text"
            else:
                reason = _fault_of_quality(row, quality_column, min_quality, number, faults)
            if reason:
                counts.skipped[reason] += 1
            else:
                yield Document(f"{file.name}:{number}", value)
    finally:
        if faults.count:
            counts.notes.append(f"{printable(file.path)}: faulty rows: {faults.count}; the first: {faults.first}")


@dataclass
class _Faults:
    """How many rows of a file have faults, and what the first is."""

    count: int = 0
    first: str = ""

    def note(self, fault: str) -> None:
        """Count a row's fault; "": it has none."""
        self.count += bool(fault)
        self.first = self.first or fault


def _fault_of_quality(row: Mapping[str, object], column: str, least: float, number: int, faults: _Faults) -> str:
    """Why a row is left out for its quality; "" if it is kept."""
    if not column:
        return ""
    value = row.get(column)
    score = _number(value)
    if score is None:
        if value is not None:
            faults.note(f"row {number} has {shown(value)} in {column!r}, which is no number")
        return f"without a number in {column!r}"
    # A score of 0.9 that is stored in four bytes is a little less.
    return "" if score >= least or math.isclose(score, least, rel_tol=1e-7) else f"with {column} below {least:g}"


def _number(value: object) -> float | None:
    """A number, also a decimal and one that is written as text; None for anything else."""
    if not isinstance(value, int | float | Decimal | str) or "_" in str(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _extension(path: Path) -> str:
    """`.txt` of `a.TXT`; nothing for `GPL-3` and `Apache-2.0`, whose last part is a version number."""
    return path.suffix.lower() if re.search(r"[A-Za-z]", path.suffix) else ""


def _read_text(path: Path, counts: Counts) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        counts.documents -= 1
        counts.skipped_files["unreadable"] += 1
        counts.notes.append(f"{printable(path)}: {error.strerror}")
        return None
    text, bad = _decoded(data)
    if _is_damaged(text, bad):
        counts.documents -= 1
        counts.skipped_files["not UTF-8 text"] += 1
        why = f"this is {packed(data)}" if packed(data) else "not UTF-8 text, left out; convert it with iconv"
        counts.notes.append(f"{printable(path)}: {why}")
        return None
    if bad:
        counts.notes.append(f"{printable(path)}: bytes that are not UTF-8: {bad}, replaced by U+FFFD")
    return text


def _decoded(data: bytes) -> tuple[str, int]:
    """(text of bytes in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; wrong bytes in them)."""
    data = utf8(data)
    try:
        text, bad = data.decode("utf-8-sig"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", "replace")
        bad = text.count("\ufffd")
    return text, bad + text.count("\0")


def _is_damaged(text: str, bad: int) -> bool:
    """Whether so many wrong characters say that this is no text, or a text in another encoding."""
    return bad > max(10, len(text) // 100)
