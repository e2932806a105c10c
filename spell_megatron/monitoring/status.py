"""How a run is doing: `status.json` in its folder.

Rank 0 writes the file again every few seconds, so its age tells whether the run is alive.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.files import when_there, write_text
from spell_megatron.monitoring.queue import SUBMITTED
from spell_megatron.monitoring.stopping import Stopped
from spell_megatron.processes.folder_lock import lives, silent_for
from spell_megatron.processes.holder import Holder
from spell_megatron.ranks import slurm_job, slurm_restarts

INTERVAL = 5.0
"""Seconds between two heartbeats."""

_AGAIN = 0.2  # seconds after which a file that cannot be read is read again: it may just have been replaced

SILENT_AFTER = 60.0
"""Seconds without a heartbeat after which a run is taken for dead."""

_FIELDS = {"state", "steps", "host", "pid", "job", "restart", "time"}


class Status:
    """Keeps `status.json` of a run up to date. A context manager: on leaving, the file says how the run ended.

    Args:
        folder: the run's folder.
        steps: how many the run will make.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._path = folder / "status.json"
        self._state: dict[str, Any] = {
            "state": "starting",
            "steps": steps,
            "started": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": slurm_job(),
            "restart": slurm_restarts(),
        }
        self._engines: Callable[[], Iterable[dict]] = tuple
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Status:
        if not slurm_restarts():
            self._path.with_name("stop").unlink(missing_ok=True)  # meant for an earlier job
        self.update()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        self._thread.join()
        if isinstance(error, Stopped):
            self._state |= {"state": "stopped"}
        elif error is not None:
            self._state |= {"state": "failed", "message": str(error) or type(error).__name__}
        with suppress(OSError):  # a full disk must not hide why the run failed
            self.update(stage=None)

    def update(self, **fields: Any) -> None:
        """Change fields and write the file."""
        with self._lock:
            self._state |= fields
            write_text(self._path, json.dumps(self._state | {"time": time.time()}, indent=1))

    def stage(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Set what the run is doing; the next heartbeat writes it."""
        with self._lock:
            if self._state.get("stage") != name:
                self._state |= {"stage": name, "stage_since": time.time()}
            self._state |= {"done": done, "total": total}

    def watch(self, engines: Callable[[], Iterable[dict]]) -> None:
        """Ask for the state of the engines with each heartbeat: {"url", "healthy"} of each."""
        self._engines = engines

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL):
            with suppress(OSError):  # the run goes on with a disk that is full for a while
                self.update(engines=list(self._engines()))


def read(folder: Path) -> dict[str, Any]:
    """What a run last said of itself; of one that has a job and has never started, what can be said.

    Raises:
        UserError: there is no run in this folder, one of an earlier version, or its file is damaged.
    """
    path = folder / "status.json"
    try:
        path.stat()
        return _by_our_clock(path, when_there(path, _said, _AGAIN))
    except FileNotFoundError:
        if (folder / SUBMITTED).exists():
            return {"state": "submitted", "job": None, "restart": -1, "time": 0.0}
        what = "is not a folder" if not folder.is_dir() else "has no status.json: no run has been started in it"
        raise UserError(f"{folder} {what}. Give the folder of a run, run.output_dir/run.name.") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is not a folder. Give the folder of a run, run.output_dir/run.name.") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). A run that is alive writes it again within {INTERVAL:.0f} seconds: try "
            f"again. If it stays so, the run has died: see {folder / 'logs'}, and continue it with "
            f"`spell train --resume {folder}`."
        ) from error


def _said(path: Path) -> dict[str, Any]:
    said = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(said, dict) or not isinstance(said.get("time"), int | float) or not said.keys() >= _FIELDS:
        raise ValueError("it does not say what it should")
    return said


def holder(said: dict[str, Any]) -> Holder:
    """The process that wrote a status."""
    return Holder.of(said | {"since": said.get("started"), "started": ""}, "`spell train`")


def _by_our_clock(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """A status with its times by this machine's clock, where that of the run's machine is wrong by a minute or more.

    The filesystem knows how long ago the file was written. If that is less than the status says, the file may also be
    a copy: only one that changes is believed.
    """
    quiet = silent_for(path)
    wrong = time.time() - quiet - said["time"]
    if ended(said) or abs(wrong) < SILENT_AFTER:
        return said
    if wrong > 0 and (quiet > SILENT_AFTER or not lives(path, holder(said), doubtful=True)):
        return said
    times = {name: said[name] + wrong for name in ("time", "started", "stage_since") if said.get(name)}
    return said | times


def ended(status: dict[str, Any]) -> bool:
    """Whether the run says itself that it has ended."""
    return status.get("state") in ("finished", "stopped", "failed", "submitted")


def silent(status: dict[str, Any]) -> float:
    """Seconds since the last sign of life of a run that should give some; 0 if all is well."""
    age = time.time() - status["time"]
    return 0.0 if ended(status) or age < SILENT_AFTER else age
