"""A process that works in a folder, and whether it is still there as far as this machine can know."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.ranks import slurm_job, slurm_restarts


@dataclass(frozen=True)
class Holder:
    """A process that works in a folder.

    Attributes:
        command: what it is, for users.
        host, pid: where it runs.
        job, restart: its Slurm job, if it is part of one, and how often that has been queued again.
        since: when it began, in seconds since 1970 by its own clock.
        machine: of its kernel and of its space of process numbers; "" if not known.
        started: when the kernel started the process; numbers of processes are used again.
    """

    command: str
    host: str
    pid: int
    job: str | None = None
    restart: int = 0
    since: float = 0.0
    machine: str = ""
    started: str = ""

    @classmethod
    def this_process(cls, command: str) -> Holder:
        place = socket.gethostname(), os.getpid(), slurm_job(), slurm_restarts()
        return cls(command, *place, time.time(), _machine(), _started(os.getpid()))

    @classmethod
    def of(cls, fields: dict[str, Any], command: str = "a process") -> Holder:
        """From what it wrote of itself; what it left out, or is of no use, stays unknown."""
        known: dict[str, Any] = {"command": command, "host": "an unknown host", "pid": 0}
        return cls(**known | {name: fields[name] for name in cls.__dataclass_fields__ if name in fields})

    def here(self) -> bool | None:
        """Whether the process is there; None if this machine cannot know."""
        if not self.pid or not _machine():
            return None
        if self.machine:
            return _started(self.pid) == self.started if self.machine == _machine() else None
        # The host's name alone shows that the process has gone, but not that it is still the same.
        return None if self.host != socket.gethostname() or _started(self.pid) else False

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since)) if self.since else "an unknown time"
        return f"{self.command}, process {self.pid or '?'} on {self.host}{job}, since {since}"


def _machine() -> str:
    """A word for this kernel, since its start, and for the space that its process numbers are in; "" if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When the kernel started a process, in its own unit; "": there is no such process, or only its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
