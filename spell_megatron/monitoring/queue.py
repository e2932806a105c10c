"""The job of a run in Slurm's queue, where there is a Slurm to ask."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError

SUBMITTED = Path("jobs", "submitted")
"""In a run's folder: the number of the job that `spell launch` has submitted last."""

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")


@dataclass(frozen=True)
class Job:
    """A job, as Slurm sees it.

    Attributes:
        state: Slurm's word, such as RUNNING; in lower case, why there is none.
        restarts: how often it has been queued again; -1: not known.
    """

    number: str
    state: str
    restarts: int = -1

    @property
    def waits(self) -> bool:
        """Whether it waits in the queue."""
        return self.state in _WAITING

    def runs_again(self, said: dict[str, Any]) -> bool:
        """Whether it waits or runs after the start that `said` this of itself (`status.read`)."""
        return self.waits or self.number != said["job"] or self.restarts > said["restart"]


def job_of(folder: Path, said: dict[str, Any]) -> Job | None:
    """The job of a run that `said` this of itself, or the one that was submitted since; None if there is none."""
    number, path = said["job"], folder / SUBMITTED
    if path.exists() and path.stat().st_mtime > said["time"]:
        newer = look(path.read_text(encoding="utf-8").strip())
        if newer.restarts >= 0:  # it is in the queue
            return newer
    return look(number) if number else None


def look(number: str) -> Job:
    """What Slurm says of a job."""
    if shutil.which("squeue") is None:
        return Job(number, "no squeue here to ask")
    command = ["squeue", "--noheader", "--Format=State:30,RestartCnt:10", "--jobs", number]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        gone = done.returncode == 0 or "Invalid job id" in done.stderr
        return Job(number, "not in the queue" if gone else "squeue does not answer")
    state, restarts = done.stdout.split()[:2]  # of a heterogeneous job: its first part
    return Job(number, state, int(restarts))


def cancel(job: Job) -> None:
    """Take a job out of the queue.

    Raises:
        UserError: Slurm refuses.
    """
    done = subprocess.run(["scancel", job.number], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"Job {job.number} waits in the queue, and Slurm does not cancel it: {done.stderr.strip()}. The user who "
            "has submitted it can cancel it. Until then the run ends as soon as it starts."
        )
