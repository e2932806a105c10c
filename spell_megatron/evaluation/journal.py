"""An append-only file of results, so that paid work is not lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.files import json_lines


class Journal:
    """A JSONL file to which every result is appended as soon as there is one. A context manager.

    One process may have it open; `evaluate` keeps its folder for itself. A line is written by one system call, so that
    a process that is killed leaves whole lines; only a machine that fails can cut the last one, and opening the file
    removes what is left of it.

    Raises:
        UserError: it is not a journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Journal:
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._drop_torn_line()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def _drop_torn_line(self) -> None:
        end = size = os.fstat(self._file).st_size
        while end and os.pread(self._file, 1, end - 1) != b"\n":
            step = min(end, 1 << 16)
            end = end - step + os.pread(self._file, step, end - step).rfind(b"\n") + 1
        if end < size:
            os.ftruncate(self._file, end)

    def append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode("ascii")
        written = os.write(self._file, line)
        if written < len(line):  # the disk is full: leave no half line to be continued
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            os.write(self._file, line)  # raises the error of the disk

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in the order in which they were appended, also by earlier processes."""
        for number, row, fault in json_lines(self.path):
            fault = fault or ("" if isinstance(row, dict) else "is not a JSON object")
            if fault:
                raise UserError(
                    f"Line {number} of {self.path} is damaged: it {fault}. Remove that line, and what it held is made "
                    "again."
                )
            yield row
