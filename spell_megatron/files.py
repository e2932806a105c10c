"""Files and folders that appear when they are complete, files of other machines, files with one JSON value a line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from spell_megatron.encodings import utf8_stream
from spell_megatron.errors import UserError, explain

Value = TypeVar("Value")

LATE = 120.0
"""Seconds after which a machine sees what another has written to a shared filesystem. NFS may take one minute."""
_PAUSE = 0.2  # seconds between two looks

MAX_FAULTS = 10
"""Faulty lines of a file that an error names."""


@contextmanager
def appearing_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends well, and else is removed."""
    partial = path.with_name(path.name + ".tmp")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails, on a full disk say, does not name the file
        raise
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


def check_writable(folder: Path, names: Iterable[str]) -> None:
    """Make a folder if it is not there, and see before the work begins that files of these names can be written in it.

    Raises:
        UserError: one of them cannot.
    """
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in names):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if os.path.exists(path) and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe, whose place the file would take
                raise OSError(errno.EINVAL, "it is not a regular file")
            path.with_name(path.name + ".tmp").open("ab").close()
            path.with_name(path.name + ".tmp").unlink()
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Name another place, or make this one writable."
        ) from error


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
        reason = explain(error) or f"{error}. Choose another folder"
        raise UserError(f"{out} could not be written: {reason}. What was there before is unchanged.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def when_there(path: Path, look: Callable[[Path], Value | None], seconds: float = LATE) -> Value:
    """What `look` finds at a path where another machine writes, as soon as it finds it.

    A machine may see a shared filesystem as it was a while ago: without the file, with an empty one or a part of it, or
    with a handle of a file that has been replaced.

    Args:
        path: of a file or folder.
        look: None, an OSError or a ValueError: what is there is not complete.
        seconds: how long to wait.

    Raises:
        TimeoutError: it was not found in time; the message says what was seen last.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = look(path)
            if found is not None:
                return found
            seen = "it is not complete"
        except OSError as error:
            seen = error.strerror or str(error)
        except ValueError as error:
            seen = str(error)
        if time.monotonic() > deadline:
            raise TimeoutError(seen)
        # A networked filesystem may remember that a file is not there; listing its folder makes it look again.
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(min(_PAUSE, seconds))


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder with its parents, unless it is there.

    Another machine may just have made it, so that it can neither be made nor seen yet: then it is waited for.

    Raises:
        OSError: it cannot be made; or it is not seen in time.
    """

    def make(folder: Path) -> OSError | bool:
        try:
            folder.mkdir(mode, parents=True, exist_ok=True)
        except OSError as error:
            if folder.is_file() or error.errno not in (errno.EEXIST, errno.ESTALE):
                return error
            raise
        return True

    made = when_there(folder, make)
    if isinstance(made, OSError):
        raise made


def json_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """`parse_json_lines` of a file; one that is packed or of another kind, whatever its name, has one faulty line."""
    with path.open("rb") as file:
        try:
            lines = utf8_stream(file)
        except ValueError as error:
            yield 1, None, f"is not JSON: {error}"
        else:
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
