"""What trainer and engines did, and when: `timeline.jsonl` in the folder of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRAINER, ENGINES = "trainer", "engines"

LANES = {
    "starting engines": (ENGINES,),
    "rollout": (ENGINES,),
    "validation": (ENGINES,),
    "push": (TRAINER, ENGINES),
    "comparing engines and trainer": (TRAINER, ENGINES),
}
"""Who is at work in a stage; in any other it is the trainer."""


class Timeline:
    """Appends a line for each span of work that has ended: its step, name, lanes, start and end.

    A resumed run goes on in the same file. Spans before the first step of a start have the step null.

    Attributes:
        step: that the spans belong to from now on.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "timeline.jsonl"
        self._zero = time.time() - time.monotonic()  # a clock that is set while the run goes does not move its spans
        self.step: int | None = None
        self._ended: float | None = None  # when the work of the open span ended, by `time.monotonic`
        self._append("\n")  # ends a line that a crash has cut

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the block as work of this name, also where it fails."""
        start, self._ended = time.monotonic(), None
        try:
            yield
        finally:
            end, self._ended = self._ended or time.monotonic(), None
            first, last = (round(self._zero + seconds, 4) for seconds in (start, end))
            lanes = LANES.get(name, (TRAINER,))
            record = {"step": self.step, "name": name, "lanes": lanes, "start": first, "end": last}
            self._append(json.dumps(record) + "\n")

    def ended(self, at: float) -> None:
        """The work of the open span, in which no other is open, ended at this time, before its block.

        at: by `time.monotonic`.
        """
        self._ended = at

    def _append(self, text: str) -> None:
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # no run ends for want of a timeline
            file.write(text)
