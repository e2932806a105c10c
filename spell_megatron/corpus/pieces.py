"""The pieces of usable documents: one file of them, mapped into memory and read piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

_NAME = "pieces.arrow"
_SCHEMA = pa.schema(
    [
        ("document", pa.int64()),
        ("id", pa.string()),
        ("folder", pa.string()),
        ("text", pa.string()),
        ("characters", pa.int64()),
        ("tokens", pa.int64()),
    ]
)


class PieceWriter:
    """Writes the file batch by batch."""

    def __init__(self, file: pa.RecordBatchFileWriter) -> None:
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[PieceWriter]:
        with pa.ipc.new_file(str(folder / _NAME), _SCHEMA) as file:
            yield cls(file)

    def write(self, rows: Sequence[tuple[int, str, str, str, int, int]]) -> None:
        """Append rows (number of the document, id, folder, text, characters, tokens)."""
        if rows:
            self._file.write_batch(pa.record_batch([list(column) for column in zip(*rows, strict=True)], _SCHEMA))


class Pieces:
    """The pieces that a `PieceWriter` has written to a folder. A row is the number of a piece."""

    def __init__(self, folder: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(folder / _NAME))).read_all()

    def column(self, name: str) -> np.ndarray:
        """A whole column of numbers `[pieces]`."""
        return self._table[name].to_numpy()

    def values(self, name: str, rows: Iterable[int]) -> list[Any]:
        """Values of a column in some rows."""
        # Not `take`, which joins all chunks of a column first: that would read the whole file for each cluster.
        column = self._table[name]
        return [column[row].as_py() for row in rows]

    def folders(self, rows: np.ndarray) -> list[str]:
        """The folder of each of many rows; "" where the folder makes no cluster."""
        return self._table["folder"].take(pa.array(rows)).to_pylist()
