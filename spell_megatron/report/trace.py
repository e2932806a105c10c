"""Timelines of runs as a file for https://ui.perfetto.dev and chrome://tracing (the Trace Event Format)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.files import check_writable, write_text
from spell_megatron.monitoring.timeline import ENGINES, TRAINER
from spell_megatron.plural import counted
from spell_megatron.report.report import short_names
from spell_megatron.report.timeline import Span, read_timeline, steps_of

LANES = ("steps", TRAINER, ENGINES)


def write_trace(folders: Sequence[Path], out: Path) -> str:
    """Write what trainer and engines of some runs did, all their starts, to the file `out`; a line that says what.

    Raises:
        UserError: a folder has no timeline, or `out` cannot be written.
    """
    check_writable(out.parent, [out.name])
    events: list[dict[str, Any]] = []
    count = 0
    for number, (folder, name) in enumerate(short_names(folders).items(), start=1):
        spans = read_timeline(folder)
        if not spans:
            raise UserError(
                f"{folder} has no timeline.jsonl that can be read. A run writes one while it goes (`spell train` "
                "since version 0.3); name the folder of such a run."
            )
        events += _events(number, name, spans)
        count += len(spans)
    write_text(out, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    what = f"{counted(count, 'span')} of {counted(len(folders), 'run')}"
    return f"{out}: {what}; open it in https://ui.perfetto.dev or chrome://tracing"


def _events(number: int, name: str, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """A run is a process, a lane is a thread; microseconds since the run began."""
    yield {"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}}
    # Perfetto takes thread 0 for the idle one, and one with the number of its process for the main one.
    threads = {lane: 10 * number + place for place, lane in enumerate(LANES)}
    for lane, thread in threads.items():
        yield {"ph": "M", "pid": number, "tid": thread, "name": "thread_name", "args": {"name": lane}}
        yield {"ph": "M", "pid": number, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}
    zero = min(span.start for span in spans)

    def event(name: str, lane: str, start: float, end: float, step: int | None) -> dict[str, Any]:
        times = {"ts": round((start - zero) * 1e6), "dur": round((end - start) * 1e6)}
        return {"ph": "X", "pid": number, "tid": threads[lane], "name": name, **times, "args": {"step": step}}

    for step in steps_of(spans):
        yield event(f"step {step.step}", "steps", step.start, step.end, step.step)
    for span in spans:
        for lane in span.lanes:
            if lane in LANES:
                yield event(span.name, lane, span.start, span.end, span.step)
