"""How a run is asked to stop.

A run stops for a file `stop` in its folder (`spell stop`), for SIGTERM (the end of a job) and for SIGUSR1 (the limit of
a job's time, or preemption, is near). It gives up a rollout that is under way, ends an update, saves a checkpoint, and
returns.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from spell_megatron.errors import ExitStatus, UserError
from spell_megatron.monitoring import status

# One request may reach a process as two signals: from its launcher, and as a member of a group or a job.
_ONE_REQUEST = 5.0


class Reason(StrEnum):
    """Why a run stops before its last step."""

    STOP = "stop"
    """`spell stop` asks for it."""
    REQUEUE = "requeue"
    """SIGUSR1: the limit of the job's time, or preemption, is near. The job is to be queued again."""
    TERMINATE = "terminate"
    """SIGTERM: the end of the job."""

    @property
    def exit_status(self) -> ExitStatus:
        """How `spell train` ends after it has saved a checkpoint for this reason."""
        return {
            Reason.STOP: ExitStatus.SUCCESS,
            Reason.REQUEUE: ExitStatus.REQUEUE,
            Reason.TERMINATE: ExitStatus.TERMINATED,
        }[self]


def block_sigusr1() -> None:
    """Keep SIGUSR1 for `StopRequest`; to be called before a process has threads.

    Slurm signals all processes of a step, and SIGUSR1 would end those that do not expect it (engines, helpers of
    multiprocessing). A blocked signal stays blocked in what a process starts; one that is caught does not.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


class StopRequest:
    """Whether this run is asked to stop. A context manager, to be entered in the main thread of each process.

    SIGTERM ends the process where there is nothing to save yet, and a second one, seconds after the first signal.

    Attributes:
        can_save: whether a checkpoint can be saved.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "stop"
        self._signalled: Reason | None = None
        self._at = 0.0
        self.can_save = False

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._terminate)
        threading.Thread(target=self._wait, name="sigusr1", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _wait(self) -> None:
        signal.sigwait({signal.SIGUSR1})
        self._ask(Reason.REQUEUE)

    def _ask(self, reason: Reason) -> None:
        if self._signalled is None:
            self._signalled, self._at = reason, time.monotonic()

    def _terminate(self, number: int, _: object) -> None:
        if not self.can_save:
            sys.exit(128 + number)
        self._ask(Reason.TERMINATE)
        if time.monotonic() - self._at > _ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def reason(self) -> Reason | None:
        """Why the run is to stop; None: it is not."""
        return self._signalled or (Reason.STOP if self._file.exists() else None)


def stop(folder: Path) -> dict[str, Any]:
    """Ask a run to stop, and wait until it has ended or gives no sign of life; returns its last status.

    Raises:
        UserError: as `status.read`; the run has ended before.
    """
    if status.ended(last := status.read(folder)):
        raise UserError(f"The run in {folder} has ended already: it is {last['state']}.")
    (folder / "stop").touch()
    while not (status.ended(last := status.read(folder)) or status.silent(last)):
        time.sleep(0.5)
    return last
