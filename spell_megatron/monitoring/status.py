"""How a run is doing, for people and schedulers: `status.json` in its folder, and how it is asked to stop.

Rank 0 writes the file anew every few seconds, so its age tells whether the run is alive. A run stops for a file `stop`
in its folder (`spell stop`), for SIGTERM (the end of a job) and for SIGUSR1 (the limit of a job's time, or preemption,
is near): it gives up a rollout that is under way, ends an update, saves a checkpoint, and returns.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from spell_megatron.errors import ExitStatus, UserError
from spell_megatron.files import json_lines, write_text
from spell_megatron.ranks import slurm_job, slurm_restarts

INTERVAL = 5.0
"""Seconds between two heartbeats."""

SILENT_AFTER = 60.0
"""Seconds without a heartbeat after which a run is taken for dead."""

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
    """Keeps SIGUSR1 for `StopRequest`; to be called before a process has threads.

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


class Status:
    """Keeps `status.json` of a run up to date. A context manager: leaving it says how the run ended.

    Args:
        folder: of the run.
        steps: that the run is to make.
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
        self._path.with_name("stop").unlink(missing_ok=True)  # meant for an earlier start
        self.update()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        self._thread.join()
        if error is not None:
            self._state |= {"state": "failed", "message": str(error) or kind.__name__}
        with suppress(OSError):  # a full disk must not hide why the run failed
            self.update(stage=None)

    def update(self, **fields: Any) -> None:
        """Changes fields and writes the file."""
        with self._lock:
            self._state |= fields
            write_text(self._path, json.dumps(self._state | {"time": time.time()}, indent=1))

    def stage(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """What the run is doing; the next heartbeat tells it."""
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
    """What a run last said of itself.

    Raises:
        UserError: there is no run in this folder, or one of an earlier version.
    """
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is no folder" if not folder.is_dir() else "has no status.json: no run has been started in it"
        raise UserError(f"{folder} {what}. Give the folder of a run, run.output_dir/run.name.") from None


def stop(folder: Path) -> dict[str, Any]:
    """Asks a run to stop, and waits until it has ended; what it last said.

    Raises:
        UserError: as `read`; it has ended before.
    """
    if ended(status := read(folder)):
        raise UserError(f"The run in {folder} has ended already: it is {status['state']}.")
    (folder / "stop").touch()
    while not (ended(status := read(folder)) or silent(status)):
        time.sleep(0.5)
    return status


def ended(status: dict[str, Any]) -> bool:
    """Whether the run says itself that it has ended."""
    return status["state"] in ("finished", "stopped", "failed")


def silent(status: dict[str, Any]) -> float:
    """Seconds since the last sign of life of a run that should give some; 0 if all is well."""
    age = time.time() - status["time"]
    return 0.0 if ended(status) or age < SILENT_AFTER else age


def describe(folder: Path, status: dict[str, Any]) -> list[str]:
    """The state of a run in a few lines."""
    now, rows = time.time(), _metrics(folder)
    state = status["state"]
    if quiet := silent(status):
        state = f"no sign of life for {_time(quiet)} (it was {state}); the process has probably been killed"
    lines = [f"{folder}: {state}"]
    if status.get("message"):
        lines.append(f"  {status['message']}")
    done = rows[-1]["step"] if rows else 0
    progress = f"{done}/{status['steps']}"
    seconds = [row["time/step"] for row in rows[-10:] if row.get("time/step")]
    if seconds:
        mean = sum(seconds) / len(seconds)
        progress += f", {_time(mean)} per step"
        if not ended(status):
            progress += f", {_time(mean * (status['steps'] - done))} to go"
    lines.append(f"  steps      {progress}")
    if status.get("stage") and not ended(status):
        count = f" {status['done']}/{status['total'] or '?'}" if status.get("done") else ""
        lines.append(f"  now        {status['stage']}{count}, for {_time(now - status['stage_since'])}")
    if rows:
        last = rows[-1]
        names = (
            ("selfplay/reward", "reward {:.3f}"),
            ("train/tokens_per_second", "{:,.0f} trained tokens/s"),
            ("train/grad_norm", "grad norm {:.3f}"),
        )
        if shown := [form.format(last[name]) for name, form in names if last.get(name) is not None]:
            lines.append(f"  last step  {', '.join(shown)}")
    place = f"process {status['pid']} on {status['host']}"
    if status["job"]:
        place += f", job {status['job']} ({_job_state(status['job'])}), start {status['restart'] + 1}"
    lines.append(f"  where      {place}")
    for engine in status.get("engines", ()) if not ended(status) else ():
        lines.append(f"  engine     {engine['url']} {'healthy' if engine['healthy'] else 'does not answer'}")
    latest = folder / "checkpoints" / "latest"
    lines.append(f"  checkpoint {latest.read_text().strip() if latest.exists() else 'none yet'}")
    lines.append(f"  logs       {folder / 'logs'}")
    return lines


def _metrics(folder: Path) -> list[dict]:
    try:
        # the last line may be half written
        return [row for _, row, fault in json_lines(folder / "metrics.jsonl") if not fault]
    except FileNotFoundError:
        return []


def _job_state(job: str) -> str:
    """What Slurm says of a job."""
    if shutil.which("squeue") is None:
        return "no squeue here to ask"
    done = subprocess.run(["squeue", "--noheader", "--format=%T", "--jobs", job], capture_output=True, text=True)
    return done.stdout.strip() or "not in the queue"


def _time(seconds: float) -> str:
    seconds = round(seconds, 1) if seconds < 10 else round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
