"""`spell stop`: a run is asked to stop, and does not start again by itself. `stopping` is the run's side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.monitoring import status
from spell_megatron.monitoring.queue import Job, cancel, job_of

_QUEUE_SECONDS = 5.0


def stop(folder: Path) -> dict[str, Any]:
    """Ask a run to stop, and wait until it has ended or gives no sign of life; returns its last status.

    A job that waits to start the run, again or for the first time, is cancelled.

    Raises:
        UserError: as `status.read`; the run has ended before; Slurm does not cancel its job.
    """
    said = status.read(folder)
    job = job_of(folder, said)
    if status.ended(said) and not (job and job.runs_again(said)):
        raise UserError(f"The run in {folder} has ended already: it is {said['state']}.")
    (folder / "stop").touch()  # an end that is under way sees it too, and a start that Slurm makes of the same job
    while not (job and job.waits):
        while not (status.ended(now := status.read(folder)) or status.silent(now)):
            time.sleep(0.5)
        job = job_of(folder, now)
        if not (job and (job.waits or _starts(job, now))):
            return now
        time.sleep(_QUEUE_SECONDS)
    cancel(job)
    return status.read(folder)


def _starts(job: Job, said: dict[str, Any]) -> bool:
    """Whether a job runs that has started the run again, which has not said so yet."""
    return job.state == "RUNNING" and job.runs_again(said)
