"""What the policy learned, in a sentence: held-out accuracy at the start and at the end, and what chance explains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from spell_megatron.report.runs import Run

CHANCE = 2.0
"""Standard errors of a difference that chance explains."""

Kind = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """`first` and `last`: held-out accuracy as shares, None if it was not measured; `questions`: how many it is of."""

    kind: Kind
    text: str
    first: float | None = None
    last: float | None = None
    error: float | None = None
    questions: int | None = None


def verdict(run: Run) -> Verdict:
    """What the policy of a run learned, as far as its log tells."""
    accuracy = run.column("validation/pass@1")
    measured = [i for i, value in enumerate(accuracy) if value is not None]
    if not measured:
        return Verdict("unknown", "Held-out accuracy was not measured: validation.questions names a file for that.")
    first, last = measured[0], measured[-1]
    count = run.column("validation/questions")[last]
    error = run.column("validation/standard_error")[last]
    found = Verdict("unknown", "", accuracy[first], accuracy[last], error, None if count is None else int(count))
    if first == last:
        return replace(found, text=f"Held-out accuracy was measured once, after step {run.steps[last]}.")
    kind, text = _change(run, first, last)
    return replace(found, kind=kind, text=text)


def _change(run: Run, first: int, last: int) -> tuple[Kind, str]:
    """How held-out accuracy changed from the record `first` to the record `last`."""
    if True not in run.made and False in run.made:
        return "unknown", "No update was made: the policy is the one that it started from."
    for name in ("validation/question_set", "validation/questions"):
        column = run.column(name)
        if column[first] != column[last]:
            return "unknown", "The held-out questions changed during the run, so first and last cannot be compared."
    accuracy, errors = run.column("validation/pass@1"), run.column("validation/standard_error")
    gain = 100 * ((accuracy[last] or 0.0) - (accuracy[first] or 0.0))
    before, after = errors[first], errors[last]
    if before is None or after is None:
        return "unknown", f"Held-out accuracy changed by {gain:+.1f} points. What chance explains is not known."
    # the questions are the same, so this is rather too large
    chance = 100 * CHANCE * math.hypot(before, after)
    if abs(gain) <= chance:
        return "same", f"No measurable change: {gain:+.1f} points, where chance explains ±{chance:.1f}."
    if gain > 0:
        return "better", f"Held-out accuracy rose by {gain:.1f} points; chance explains ±{chance:.1f}."
    return "worse", f"Held-out accuracy fell by {-gain:.1f} points; chance explains ±{chance:.1f}."
