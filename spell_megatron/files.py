"""Files and folders that appear when they are complete, and files with one JSON value a line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError

MAX_FAULTS = 10
"""Faulty lines of a file that an error names."""


@contextmanager
def appearing_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends well, and else is removed."""
    partial = path.with_name(path.name + ".tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write a text file that appears when it is complete.

    sync: wait until it is on the disk, so that no rename that follows overtakes it.
    """
    with appearing_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` when the block ends well, and else is removed.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    partial, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(
            f"{out} could not be written: {reason}. What was there before is unchanged. "
            "Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def json_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """`parse_json_lines` of a file."""
    with path.open("rb") as lines:
        yield from parse_json_lines(lines)


def parse_json_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any, str]]:
    """(number, value, fault) of each line that is not blank, in UTF-8 with or without a byte order mark.

    The fault is "" for a line of JSON. For any other line it says what the line is not, and the value is None.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig")), ""
        except UnicodeDecodeError as error:
            yield number, None, f"is not UTF-8 (byte {error.start + 1})"
        except (ValueError, RecursionError) as error:
            yield number, None, f"is not JSON ({error})"


def read_json_objects(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of a file with one JSON object a line.

    Raises:
        UserError: it cannot be read, or naming the first ten lines that are something else; `what` says what it is.
    """
    rows, faults = [], []
    try:
        for number, value, fault in json_lines(path):
            if fault:
                faults.append(f"line {number} {fault}")
            elif isinstance(value, dict):
                rows.append((number, value))
            else:
                faults.append(f"line {number} is not a JSON object")
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}. Correct its name.") from error
    if faults:
        more = f" (and {len(faults) - MAX_FAULTS} more)" if len(faults) > MAX_FAULTS else ""
        raise UserError(
            f"The {what} {path} cannot be read: {'; '.join(faults[:MAX_FAULTS])}{more}. "
            "Every line must be one JSON object in UTF-8."
        )
    return rows
