"""What the folder of a run says: settings, versions, how it is doing, and its metrics over the steps."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spell_megatron.errors import UserError
from spell_megatron.files import parse_json_lines
from spell_megatron.monitoring import status
from spell_megatron.plural import counted
from spell_megatron.report.evaluations import is_evaluation
from spell_megatron.report.timeline import Span, read_timeline

MAX_STEP = 2**53
"""Steps from here on are no steps: a browser cannot tell them apart."""


@dataclass
class Run:
    """What the folder of a run holds. Columns stand over `steps`, None where a step did not log the metric."""

    folder: Path
    name: str
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    times: list[float | None] = field(default_factory=list)
    """When each step was logged, by the clock of its machine."""
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    """Steps in which a metric was logged that was no finite number."""
    settings: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] | None = None
    """What the run last said of itself (`monitoring.status`); None: nothing that can be read."""
    versions: dict[str, str] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    """What trainer and engines did, and when."""
    notes: list[str] = field(default_factory=list)

    @property
    def planned(self) -> int | None:
        """Steps that the run was to take, as far as the folder says."""
        planned = self.settings.get("run.steps", (self.status or {}).get("steps"))
        return planned if isinstance(planned, int) and not isinstance(planned, bool) else None

    def column(self, name: str) -> list[float | None]:
        """A metric over `steps`."""
        return self.metrics.get(name) or [None] * len(self.steps)

    @property
    def made(self) -> list[bool | None]:
        """Whether each step's update was made; None: the log does not tell."""
        skipped, empty, norm = (self.column(f"train/{name}") for name in ("skipped", "empty", "grad_norm"))
        return [
            None if (left_out, nothing, size) == (None, None, None) else not left_out and not nothing
            for left_out, nothing, size in zip(skipped, empty, norm, strict=True)
        ]


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


def read_run(folder: Path, name: str) -> Run:
    """Read what the folder of a run holds.

    A line that is not complete, because it is being written or the run crashed, is left out. When a step comes again
    because the run was resumed, the earlier records of this step and of later ones no longer count.

    Raises:
        UserError: the folder is not one of a run.
    """
    log, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not is_run(folder):
        found = sorted(str(below) for below in folder.glob("*") if is_run(below) or is_evaluation(below))
        hint = f" It holds such folders, though: {', '.join(found[:5])}." if found else ""
        if (folder / "evaluation.json").is_file():
            hint = " It holds an unfinished evaluation: run its command again to finish it."
        raise UserError(
            f"{folder} is not the folder of a run or an evaluation: it has none of metrics.jsonl, config.yaml and "
            f"scores.json.{hint}"
        )
    run = Run(folder, name, status=_status(folder), versions=_versions(folder), spans=read_timeline(folder))
    if config.is_file():
        run.settings = _settings(config, run.notes)
    records = _records(log, run.notes) if log.is_file() else {}
    run.steps = sorted(records)
    run.times = [number(records[step].get("time")) for step in run.steps]
    for place, step in enumerate(run.steps):
        for name, value in records[step].items():
            plain = number(value)
            if plain is not None:
                run.metrics.setdefault(name, [None] * len(run.steps))[place] = plain
            elif _not_finite(value):
                run.not_finite.setdefault(name, []).append(step)
    for name in ("step", "time"):
        run.metrics.pop(name, None)
    if not run.steps:
        run.notes.append("has not logged a step yet")
    elif run.status is None and run.planned and run.steps[-1] < run.planned:
        run.notes.append(f"step {run.steps[-1]} of {run.planned}: still going, or stopped early")
    return run


def _records(log: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Step -> what metrics.jsonl says of it."""
    records: dict[int, dict[str, Any]] = {}
    unreadable: list[int] = []
    line, newest = 0, -1
    content = log.read_bytes()  # once: the run may be writing it
    for line, record, _ in parse_json_lines(io.BytesIO(content)):
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MAX_STEP:
            unreadable.append(line)
            continue
        if step == newest and "time/step" not in record:  # a validation that was made after a resume
            records[step] |= record
            continue
        if step <= newest:
            records = {earlier: kept for earlier, kept in records.items() if earlier < step}
        records[step], newest = record, step
    # The last line has no line break while it is being written.
    if (count := len(unreadable) - (line in unreadable and not content.endswith(b"\n"))) > 0:
        notes.append(f"{counted(count, 'unreadable line')} of metrics.jsonl left out")
    return records


def number(value: Any) -> float | None:
    """A number, as it was logged; None for texts and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _not_finite(value: Any) -> bool:
    """Whether a value of a record was a number that is not finite; the log writes null for those."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _settings(config: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(_flat(yaml.safe_load(config.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        notes.append(f"its config.yaml cannot be read ({type(error).__name__})")
        return {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def _status(folder: Path) -> dict[str, Any] | None:
    """What status.json says, if it says how the run is doing and when."""
    state = _json(folder / "status.json")
    if not isinstance(state.get("state"), str) or number(state.get("time")) is None:
        return None
    try:
        return status.read(folder)  # with times by this machine's clock
    except UserError:  # of another version: it says less
        return state


def _json(path: Path) -> dict[str, Any]:
    """A file's object; {} if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _versions(folder: Path) -> dict[str, str]:
    """Versions of packages at the run's last start; of earlier versions' runs, those of a checkpoint."""
    for path in (folder / "versions.json", *sorted((folder / "checkpoints").glob("step_*/meta.json"), reverse=True)):
        if found := {name: value for name, value in _json(path).items() if isinstance(value, str)}:
            return found
    return {}
