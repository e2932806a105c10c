"""One process at a time in a folder.

The holder makes the file `lock-1`, which says who the holder is, and touches it every few seconds. On the same machine
a lock is free as soon as its process is gone. Elsewhere a process is taken for dead when its file does not change for
a minute. The clocks of two machines are never compared: what counts is that the file changes, and its age by the clock
of its own filesystem.

Nobody removes the lock of a dead process: two could do so at once, and both go on. The next holder makes `lock-2`,
which only one process can. A holder removes all of them at its end. If it finds that another has come after it (it was
suspended, perhaps for hours), it ends at once, before it writes into the folder of the other.

All of this rests on one promise of shared filesystems, NFS included: that a file can be made exclusively (O_EXCL).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from spell_megatron.errors import ExitStatus, UserError, explain
from spell_megatron.files import make_folder
from spell_megatron.processes.holder import Holder
from spell_megatron.processes.signals import REQUESTS

BEAT = 5.0
"""Seconds between two signs of life."""
SILENT = 60.0
"""Seconds without a sign of life after which a process of another machine is taken for dead."""
APART = 600.0
"""Of an older file the age is enough. Where a filesystem takes the times of its clients, their clocks may be apart, but
in one Slurm cluster by no more than five minutes: its authentication (munge) would fail."""
_PAUSE = 0.5  # seconds between two looks at a file


class FolderLock:
    """Keeps other processes out of a folder. A context manager.

    In a Slurm job it waits until it is known whether the holder is dead, and if the holder is an earlier start of the
    same job, for its end. Slurm has ended or given up that start, so after a minute the folder is taken from it.
    Elsewhere a user waits for the answer: whoever has shown a sign of life in the last minute is taken for alive.

    Args:
        folder: made if it is not there.
        command: what this process is, for users.
        remedy: what a user can do about a holder that is alive.
        name: of the files in the folder.

    Raises:
        UserError: another process works in the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, command: str, remedy: str, name: str = "lock") -> None:
        self._folder, self._remedy, self._name = Path(folder), remedy, name
        self._own = Holder.this_process(command)
        self._text = json.dumps(asdict(self._own))
        self._number = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> FolderLock:
        try:
            make_folder(self._folder)
            superseded = self._acquire()
        except OSError as error:
            reason = explain(error) or f"{error.strerror or error}. Name another place, or make this one writable"
            raise UserError(f"Cannot write {self._folder}: {reason}.") from error
        self._thread.start()
        if superseded:  # it sees the new file, and ends
            _until(lambda: not superseded.exists())
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for number in range(1, self._number + 1):  # upwards: whoever begins anew finds the last of them until the end
            with suppress(OSError):
                self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number}"

    def _acquire(self) -> Path | None:
        """Make the next lock file; returns the one before if its holder, an earlier start of this job, is alive."""
        while True:
            last = newest(self._folder, self._name)
            before = self._path(last)
            holder = read_holder(before) if last else None
            alive = holder is not None and self._is_held(before, holder)
            if self._make(last + 1):
                # Since it was looked at, others may have removed what was there before, and begun anew.
                same = holder is None or (before.exists() and read_holder(before) == holder)
                if same and newest(self._folder, self._name) == last + 1:
                    self._number = last + 1
                    return before if alive else None
                self._path(last + 1).unlink()
            time.sleep(_PAUSE)  # another was faster, or this machine does not see its file yet

    def _make(self, number: int) -> bool:
        """Make a lock file; False if there is one."""
        try:
            descriptor = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(self._text)
        except OSError:  # the disk is full
            self._path(number).unlink(missing_ok=True)
            raise
        return True

    def _is_held(self, path: Path, holder: Holder) -> bool:
        """Whether the holder is alive; then it is an earlier start of this process's job.

        Raises:
            UserError: it is alive, and has nothing to do with this process.
        """
        own = self._own
        alive = lives(path, holder, certain=own.job is not None)
        if not alive:
            return False
        if own.job is None or holder.job != own.job or holder.restart >= own.restart:
            raise UserError(in_use(self._folder, holder, self._remedy))
        _say(f"waiting for the end of an earlier start of this job in {self._folder} ({holder}).")
        return not _until(lambda: not path.exists() or holder.here() is False)

    def _beat(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)  # for whoever answers requests to stop; this thread does not
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a filesystem that does not answer for a while
                if self._path(self._number + 1).exists():
                    self._give_way()
                path = self._path(self._number)
                try:
                    if path.read_text(encoding="utf-8") not in ("", self._text):
                        self._give_way()
                    _touch(path)
                except FileNotFoundError:  # somebody has removed it
                    if not self._make(self._number):
                        self._give_way()

    def _give_way(self) -> None:
        """End this process without another write into the folder."""
        other = read_holder(self._path(newest(self._folder, self._name)))
        _say(
            f"{self._folder} now belongs to another process ({other}), which took this one for dead. This process "
            "ends, so that the two do not mix their results."
        )
        if self._path(self._number + 1).exists():
            self._path(self._number).unlink()  # the other waits for it
        os._exit(ExitStatus.USER_ERROR)


def _touch(path: Path) -> None:
    """Give a file the time of now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        raise
    except OSError:  # not every filesystem lets set a time
        with path.open("r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(content)


def in_use(folder: Path, holder: Holder, remedy: str) -> str:
    """What a user is told about a folder whose holder is alive."""
    return f"{folder} is in use by {holder}. {remedy}"


def newest(folder: Path, name: str = "lock") -> int:
    """Number of the last lock file in a folder; 0: there is none."""
    try:
        found = (re.fullmatch(rf"{re.escape(name)}-(\d+)", file) for file in os.listdir(folder))
        return max((int(match[1]) for match in found if match), default=0)
    except OSError:
        return 0


def read_holder(path: Path) -> Holder:
    """Who made a lock file."""
    deadline = time.monotonic() + BEAT
    while True:
        with suppress(OSError, ValueError):  # it is being written, or has just been removed
            return Holder.of(json.loads(path.read_text(encoding="utf-8")))
        if time.monotonic() > deadline or not path.exists():
            return Holder.of({})
        time.sleep(_PAUSE)


def lives(path: Path, holder: Holder, certain: bool = False, doubtful: bool = False) -> bool:
    """Whether the process that keeps changing a file is alive.

    Args:
        path: the file.
        holder: the process.
        certain: wait until the answer is. Else a file that has changed in the last minute is enough.
        doubtful: something else speaks against the age of the file: look whether it changes.
    """
    try:
        known = holder.here()
        # Some sites hide the processes of other users.
        if known is not None and (known or path.stat().st_uid == os.getuid()):
            return known
        quiet = silent_for(path)
    except FileNotFoundError:
        return False
    if quiet >= APART:
        return False
    if not certain and abs(quiet) < SILENT and not doubtful:
        return True
    seconds = 3 * BEAT
    if certain:
        seconds = max(seconds, min(SILENT - quiet, SILENT))
        _say(f"waiting for up to {seconds:.0f} s, to see whether {path.parent} is still in use by {holder}.")
    return _changes(path, seconds)


def _say(line: str) -> None:
    print(f"spell: {line}", file=sys.stderr, flush=True)


def silent_for(path: Path) -> float:
    """Seconds since a file has changed, by the clock of its filesystem."""
    changed = _look(path).st_mtime
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
    except OSError:  # the folder cannot be written
        now = time.time()
    return now - changed


def _look(path: Path) -> os.stat_result:
    with suppress(OSError), path.open("rb"):  # NFS asks the server again when a file is opened
        pass
    return path.stat()


def _until(holds: Callable[[], bool]) -> bool:
    """Waits until something holds, for a minute at most; whether it does."""
    deadline = time.monotonic() + SILENT
    while not (true := holds()) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return true


def _changes(path: Path, seconds: float) -> bool:
    """Whether a file changes within some seconds, and is still there."""

    def state() -> tuple[int, int]:
        found = _look(path)
        return found.st_ino, found.st_mtime_ns

    deadline = time.monotonic() + seconds
    try:
        first = state()
        while time.monotonic() < deadline:
            time.sleep(min(_PAUSE, seconds))
            if state() != first:
                return True
    except FileNotFoundError:
        pass
    return False
