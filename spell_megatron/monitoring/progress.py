"""What a run prints while it works: a bar per stage and one line per step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from spell_megatron.monitoring.glossary import LEGEND
from spell_megatron.monitoring.status import Status
from spell_megatron.monitoring.timeline import Timeline
from spell_megatron.monitoring.unread import silence
from spell_megatron.plural import counted

logger = logging.getLogger(__name__)

PLAIN_INTERVAL = 30.0
"""Seconds between two lines of one stage where there is no terminal."""

SHOWN = (
    ("selfplay/reward", "reward {:.3f}"),
    ("selfplay/rate/mixed", "mixed {:.0%}"),
    ("selfplay/rate/valid", "valid {:.0%}"),
    ("train/tokens_unshared", "tokens {:,.0f}"),
    ("train/grad_norm", "grad norm {:.3f}"),
    ("time/rollout", "rollout {:.1f}s"),
    ("train/seconds", "update {:.1f}s"),
    ("time/hidden", "of it in the rollout {:.1f}s"),
    ("time/push", "push {:.1f}s"),
    ("time/checkpoint", "checkpoint {:.1f}s"),
)
"""Metrics in the line of a step, in their order, and how they are shown."""


class PatientConsole(Console):
    """A console whose program goes on, in silence, when nobody reads any more: hours of work are not lost for it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(self.file)


class Progress:
    """Shows the stages of a run, and a line per step that stays.

    On a terminal a stage has a bar that vanishes when it ends. Elsewhere (a log file) a stage that takes
    longer than 30 seconds writes a line now and then, and short ones write nothing.
    """

    def __init__(
        self,
        enabled: bool = True,
        console: Console | None = None,
        status: Status | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """
        Args:
            enabled: False shows nothing, for the processes beside the first.
            console: where to show it; standard output by default.
            status: it gets the stages too.
            timeline: and it too.
        """
        self.console = console or PatientConsole(quiet=not enabled)
        self._status, self._timeline = status, timeline
        self._explained = False

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A stage such as "rollout"; yields what to call with the number done (and, optionally, the total).

        total: what the number counts to; None: not known yet, then the bar only moves.
        """
        logger.debug("%s begins", name)
        started = time.monotonic()
        with self.span(name), self._shown(name, total) as show:
            status = self._status
            if status is None:
                yield show
            else:
                status.stage(name)

                def update(done: int, total: int | None = total) -> None:
                    status.stage(name, done, total)
                    show(done, total)

                yield update
        logger.debug("%s took %.1f s", name, time.monotonic() - started)

    def begin_step(self, step: int) -> None:
        """What follows belongs to this step."""
        if self._timeline:
            self._timeline.step = step

    def span(self, name: str) -> AbstractContextManager[None]:
        """Work within a stage, such as a piece of the update during the rollout: only the timeline shows it."""
        return self._timeline.span(name) if self._timeline else nullcontext()

    def ended(self, at: float) -> None:
        """The work of this stage ended at this time, by `time.monotonic`: only the timeline shows it."""
        if self._timeline:
            self._timeline.ended(at)

    @contextmanager
    def _shown(self, name: str, total: int | None) -> Iterator[Callable[..., None]]:
        if not self.console.is_terminal or self.console.quiet:
            yield _Lines(self.console, name, total)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=total)

            def update(done: int, total: int | None = total) -> None:
                bars.update(task, completed=done, total=total)

            yield update

    def summary(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a step, made of those metrics that it has; before the first one, what they mean."""
        if not self._explained:
            self.line(LEGEND)
            self._explained = True
        parts = [form.format(metrics[name]) for name, form in SHOWN if name in metrics]
        self.line(
            "  ".join([f"step {step:>{len(str(steps))}}/{steps}", *parts, *no_update(metrics), *_held_out(metrics)])
        )

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a validation after `step` updates."""
        self.line("  ".join([f"held-out after step {step}:", *_held_out(metrics)]))

    def line(self, text: str) -> None:
        """Print a line, as it is, without disturbing a bar, and log it."""
        logger.info("%s", text)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """Progress of a stage where there is no terminal."""

    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self._console, self._name, self._total = console, name, total
        self._last = time.monotonic()

    def __call__(self, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL:
            self._last = now
            total = total or self._total
            count = f"{done}" if total is None else f"{done}/{total}"
            self._console.print(f"  {self._name} {count}", markup=False, highlight=False, soft_wrap=True)


def no_update(metrics: Mapping[str, float]) -> list[str]:
    """That a step did not change the weights, and why."""
    if metrics.get("train/skipped"):
        return ["no update: the gradient was not finite"]
    return ["no update: nothing to train on"] if metrics.get("train/empty") else []


def _held_out(metrics: Mapping[str, float]) -> list[str]:
    """Results over all held-out questions; those of single tasks are in the metrics file."""
    shown = [
        f"{name.removeprefix('validation/')} {value:.1%}"
        for name, value in metrics.items()
        if name.startswith("validation/pass@")
    ]
    if shown and "validation/standard_error" in metrics:
        shown[0] += f" (± {metrics['validation/standard_error']:.1%})"
    if shown and "validation/questions" in metrics:
        shown.append(f"of {counted(round(metrics['validation/questions']), 'question')}")
    return shown


def gain(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Held-out results of the first and the last validation, beside each other; "" if one is missing."""
    names = [name for name in after if name.startswith("validation/pass@") and name in before]
    parts = [f"{n.removeprefix('validation/')} {before[n]:.1%} -> {after[n]:.1%}" for n in names]
    return f"; held-out {', '.join(parts)}" if parts else ""
