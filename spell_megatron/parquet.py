"""Rows of parquet files, also of those with strings that are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS = 256


class DamagedError(ValueError):
    """A file that is no parquet file, or is damaged inside; the message says what is wrong, and after which row."""


def column_names(path: Path) -> list[str]:
    """The names of the columns.

    Raises:
        DamagedError: the file cannot be read.
    """
    with _faults("not a readable parquet file"):
        return list(pq.ParquetFile(path).schema_arrow.names)


def parquet_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """(number from 1, row, its columns that hold bytes that are not UTF-8) of each row, read piece by piece.

    Each byte that is not UTF-8 is U+FFFD in the row. A value that Python does not have (the year 10000) is None.

    Args:
        columns: the columns to read; all if empty.

    Raises:
        DamagedError: the file cannot be read.
    """
    with _faults("not a readable parquet file"):
        file = pq.ParquetFile(path)
        batches = file.iter_batches(batch_size=_ROWS, columns=list(columns) or None)
    number = 0
    while True:
        with _faults(f"damaged after row {number}"):
            if (batch := next(batches, None)) is None:
                return
            rows = _rows(batch)
        for row, faults in rows:
            number += 1
            yield number, row, faults


@contextmanager
def _faults(what: str) -> Iterator[None]:
    # The wrong bytes of a damaged file can be anything: pyarrow answers with errors of many kinds.
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, NotImplementedError, KeyError, TypeError) as error:
        raise DamagedError(f"{what} ({error})") from error


def _rows(batch: pa.RecordBatch) -> list[tuple[dict[str, Any], list[str]]]:
    try:
        return [(row, []) for row in batch.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException):
        return [_row(batch, number) for number in range(batch.num_rows)]


def _row(batch: pa.RecordBatch, number: int) -> tuple[dict[str, Any], list[str]]:
    row: dict[str, Any] = {}
    faults = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except UnicodeDecodeError:
            row[name] = _value(column[number])
            faults.append(name)
        except (ValueError, OverflowError, pa.ArrowException):
            row[name] = None
    return row, faults


def _value(scalar: pa.Scalar) -> Any:
    """The value of a scalar, somewhere inside which are bytes that are not UTF-8."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(value) for name, value in scalar.items()}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(value) for value in scalar.values]
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar | pa.StringViewScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    return scalar.as_py()
