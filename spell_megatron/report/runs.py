"""What the folder of a run says: its settings, and its metrics over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spell_megatron.errors import UserError
from spell_megatron.files import json_lines
from spell_megatron.report.evaluations import is_evaluation


@dataclass
class Run:
    """What the folder of a run holds. `metrics` are columns over `steps`, None where a step did not log the metric."""

    folder: Path
    name: str
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    first_time: float | None = None
    last_time: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def planned(self) -> int | None:
        """Steps that the run was to take, if its config.yaml says so."""
        planned = self.settings.get("run.steps")
        return planned if isinstance(planned, int) else None


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


def read_run(folder: Path, name: str) -> Run:
    """Read metrics and settings of a run.

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
    run = Run(folder, name)
    if config.is_file():
        run.settings = _settings(config, run.notes)
    records = _records(log, run.notes) if log.is_file() else {}
    run.steps = sorted(records)
    for name in {name: None for step in run.steps for name in records[step]}:
        column = [number(records[step].get(name)) for step in run.steps]
        if name not in ("step", "time") and any(value is not None for value in column):
            run.metrics[name] = column
    times = [t for step in run.steps if isinstance(t := records[step].get("time"), int | float)]
    if times:
        run.first_time, run.last_time = times[0], times[-1]
    if not run.steps:
        run.notes.append("has not logged a step yet")
    elif run.planned and run.steps[-1] < run.planned:
        run.notes.append(f"step {run.steps[-1]} of {run.planned}: still going, or stopped early")
    return run


def _records(log: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Step -> what metrics.jsonl says of it."""
    records: dict[int, dict[str, Any]] = {}
    unreadable: list[int] = []
    last = 0
    for last, record, _ in json_lines(log):
        try:
            step = int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            unreadable.append(last)
            continue
        if records and step <= max(records):
            records = {earlier: kept for earlier, kept in records.items() if earlier < step}
        records[step] = record
    # The last line has no line break while it is being written.
    if (count := len(unreadable) - (last in unreadable and not log.read_bytes().endswith(b"\n"))) > 0:
        notes.append(f"{count} unreadable line(s) of metrics.jsonl left out")
    return records


def number(value: Any) -> float | None:
    """A number with as many digits as a plot can show; None for texts and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _settings(config: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(_flat(yaml.safe_load(config.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        notes.append(f"its config.yaml cannot be read ({type(error).__name__})")
        return {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value
