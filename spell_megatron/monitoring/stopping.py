"""How a run is asked to stop, on its side; `stop_run` is the other one.

A run stops for a file `stop` in its folder (`spell stop`), for SIGTERM (the end of a job, or preemption), for SIGUSR1
(the limit of a job's time is near) and for Ctrl-C. It gives up a rollout that is under way, ends an update, saves a
checkpoint, and returns. While it starts there is nothing to save, and it returns at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path

from spell_megatron.errors import ExitStatus
from spell_megatron.processes.signals import answering
from spell_megatron.ranks import rank

# One Ctrl-C may come twice: from the terminal, and from the launcher of several processes.
_ONE_INTERRUPT = 2.0
# Wakes the main thread, also in a system call. Requests themselves do not reach that thread.
_WAKE = signal.SIGUSR2


class Reason(StrEnum):
    """Why a run stops before its last step."""

    STOP = "stop"
    """`spell stop` asks for it."""
    REQUEUE = "requeue"
    """SIGUSR1: the limit of the job's time is near. The job is to be queued again."""
    TERMINATE = "terminate"
    """SIGTERM: the end of the job."""
    INTERRUPT = "interrupt"
    """SIGINT: Ctrl-C."""

    @property
    def exit_status(self) -> ExitStatus:
        """How `spell train` ends after it has stopped for this reason."""
        return {
            Reason.STOP: ExitStatus.SUCCESS,
            Reason.REQUEUE: ExitStatus.REQUEUE,
            Reason.TERMINATE: ExitStatus.TERMINATED,
            Reason.INTERRUPT: ExitStatus.INTERRUPTED,
        }[self]


_REASONS = {
    signal.SIGUSR1: Reason.REQUEUE,
    signal.SIGTERM: Reason.TERMINATE,
    signal.SIGINT: Reason.INTERRUPT,
}


class Stopped(BaseException):
    """A run is asked to stop while it starts. No Exception: nothing that a library does may hide it."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class StopRequest:
    """Whether this run is asked to stop. A context manager, to be entered in the main thread of each process.

    Until `can_save` is set, a signal raises `Stopped` in the main thread. Then signals are only noted, however many
    there are (Slurm sends SIGTERM again when the time to save is over). But a second Ctrl-C ends the process.

    Attributes:
        can_save: whether a checkpoint can be saved.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "stop"
        self._signalled: Reason | None = None
        self._at = 0.0
        self._noted = threading.Event()
        self._stack = ExitStack()
        self.can_save = False

    def __enter__(self) -> StopRequest:
        before = signal.signal(_WAKE, self._leave)
        self._stack.callback(signal.signal, _WAKE, before)
        self._stack.enter_context(answering(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, number: signal.Signals) -> None:
        reason = _REASONS[number]
        if self._signalled is None:
            self._signalled, self._at = reason, time.monotonic()
            self._noted.set()
            if reason is Reason.INTERRUPT and rank() == 0:
                first = "saves a checkpoint and ends" if self.can_save else "ends"
                print(f"\nspell: Ctrl-C: the run {first}. Ctrl-C again ends it at once.", file=sys.stderr)
            if not self.can_save:
                signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
        elif reason is Reason.INTERRUPT and time.monotonic() - self._at > _ONE_INTERRUPT:
            os._exit(reason.exit_status)

    def _leave(self, *_: object) -> None:
        if self._signalled and not self.can_save:
            raise Stopped(self._signalled)

    def reason(self) -> Reason | None:
        """Why the run is to stop; None: it is not. `spell stop` is stronger than signals: it is to end for good."""
        return Reason.STOP if self._file.exists() else self._signalled

    def wait(self, seconds: float) -> None:
        """Wait for a signal if there was none yet."""
        self._noted.wait(seconds)
