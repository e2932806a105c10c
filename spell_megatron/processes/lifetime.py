"""Processes that end with the one that started them, and groups of processes that end at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, for whatever reason (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(group: int, patience: float = 5.0) -> None:
    """Kill all processes of a group. Python's resource trackers end by themselves, within so many seconds.

    Only they know the shared memory of processes that were killed, and remove it.
    """
    deadline = time.monotonic() + patience
    while (left := list(_members(group))) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                if not any("resource_tracker import main" in word for word in process.cmdline()):
                    process.kill()
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process
