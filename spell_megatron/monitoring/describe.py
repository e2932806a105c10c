"""What `spell status` prints of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spell_megatron.monitoring import status
from spell_megatron.monitoring.metrics import read_records
from spell_megatron.monitoring.progress import no_update
from spell_megatron.monitoring.queue import Job

SHOWN = (
    ("selfplay/reward", "reward {:.3f}"),
    ("train/tokens_per_second", "{:,.0f} trained tokens/s"),
    ("train/grad_norm", "grad norm {:.3f}"),
)
"""Metrics of the last step that are shown, and how."""


def describe(folder: Path, state: dict[str, Any], job: Job | None = None) -> list[str]:
    """The status of a run in a few lines.

    Args:
        state: what `status.read` returned.
        job: of the run, if it has one.
    """
    rows, ended = _metrics(folder), status.ended(state)
    lines = [f"{folder}: {_state(state, job)}"]
    if state.get("message"):
        lines.append(f"  {state['message']}")
    if state["state"] == "submitted":
        return lines
    lines.append(f"  steps      {_steps(state, rows)}")
    if state.get("stage") and not ended:
        count = f" {state['done']}/{state['total'] or '?'}" if state.get("done") else ""
        lines.append(f"  now        {state['stage']}{count}, for {_time(time.time() - state['stage_since'])}")
    if shown := _last_step(rows):
        lines.append(f"  last step  {', '.join(shown)}")
    lines.append(f"  where      {_place(state, job)}")
    for engine in () if ended else state.get("engines", ()):
        lines.append(f"  engine     {engine['url']} {'healthy' if engine['healthy'] else 'does not answer'}")
    latest = folder / "checkpoints" / "latest"
    lines.append(f"  checkpoint {latest.read_text().strip() if latest.exists() else 'none yet'}")
    lines.append(f"  logs       {folder / 'logs'}")
    return lines


def numbers(folder: Path, state: dict[str, Any], job: Job | None = None) -> dict[str, Any]:
    """The same as JSON values: what the run says, `silent` (seconds without a sign of life that there should be), job,
    newest checkpoint, and the metrics of the last step."""
    rows, latest = _metrics(folder), folder / "checkpoints" / "latest"
    return {
        **state,
        "silent": status.silent(state),
        "queue": asdict(job) if job else None,
        "checkpoint": latest.read_text().strip() if latest.exists() else None,
        "metrics": rows[-1] if rows else None,
    }


def _state(state: dict[str, Any], job: Job | None) -> str:
    before = "" if state["state"] == "submitted" else f"; before that it was {state['state']}"
    if job and job.waits:
        return f"waits in the queue (job {job.number}){before}"
    if state["state"] == "submitted":
        return f"submitted{_of_slurm(job)}; it has not started yet"
    if quiet := status.silent(state):
        return f"no sign of life for {_time(quiet)} (it was {state['state']}); the process has probably been killed"
    return state["state"]


def _steps(state: dict[str, Any], rows: Sequence[dict]) -> str:
    done = rows[-1]["step"] if rows else 0
    text = f"{done}/{state['steps']}"
    if seconds := [row["time/step"] for row in rows[-10:] if row.get("time/step")]:
        mean = sum(seconds) / len(seconds)
        text += f", {_time(mean)} per step"
        if not status.ended(state):
            text += f", {_time(mean * (state['steps'] - done))} to go"
    return text


def _last_step(rows: Sequence[dict]) -> list[str]:
    last = rows[-1] if rows else {}
    return [form.format(last[name]) for name, form in SHOWN if last.get(name) is not None] + no_update(last)


def _place(state: dict[str, Any], job: Job | None) -> str:
    place = f"process {state['pid']} on {state['host']}"
    if state["job"]:
        place += f"{_of_slurm(job)}, start {state['restart'] + 1}"
    return place


def _of_slurm(job: Job | None) -> str:
    return f", job {job.number} ({job.state})" if job else ""


def _metrics(folder: Path) -> list[dict]:
    try:
        return read_records(folder / "metrics.jsonl")
    except FileNotFoundError:
        return []


def _time(seconds: float) -> str:
    seconds = round(seconds, 1) if seconds < 10 else round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
