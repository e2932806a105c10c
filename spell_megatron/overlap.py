"""The trainer works while the engines write: rows that are certain to be in the batch do not wait for the others.

Rank 0 gives an order for them between two messages of the director; the other ranks wait for it as they wait for any.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from spell_megatron.config.schema import RolloutConfig, TrainingConfig
from spell_megatron.rollout.engines import Engines
from spell_megatron.rollout.servers import Servers
from spell_megatron.training.prefix_tree import Row
from spell_megatron.training.trainer import Progress, Trainer
from spell_megatron.training.waiting import Waiting


def why_not(rollout: RolloutConfig, training: TrainingConfig, engines: Engines, trainers: int) -> str:
    """Why an update waits for the end of its rollout; "" if it does not.

    Args:
        rollout, training: sections of the configuration.
        trainers: trainer processes on this machine.
    """
    if training.overlap == "off":
        return "training.overlap is off"
    if engines.transport.colocated:
        return "engines share the trainer's GPUs"
    if training.swap in ("state", "all"):
        return f"training.swap is {training.swap}"
    if training.moe_aux_loss:
        return "training.moe_aux_loss needs all rows of an update at once"
    if not engines.transport.on_cpus:
        return ""
    threads = trainers * training.threads
    if isinstance(engines.source, Servers):
        threads += rollout.replicas * rollout.tensor_parallel * rollout.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{threads} threads of trainer and engines share {cores} cores" if threads > cores else ""


def when(rollout: RolloutConfig, training: TrainingConfig, engines: Engines, trainers: int) -> tuple[bool, str]:
    """Whether an update begins during its own rollout (see `why_not`), and when it runs, for the user."""
    if training.staleness:
        return False, "Updates run during the next rollouts, on rows that are one update old (training.staleness)."
    if why := why_not(rollout, training, engines, trainers):
        return False, f"Updates wait for the end of their rollouts: {why}."
    return True, "Updates begin during their rollouts (training.overlap)."


def accumulate(trainer: Trainer, rows: Sequence[Row] | None) -> None:
    """Forward and backward on rows of the next update, which rank 0 has; all ranks call it."""
    if not trainer.under_way:
        trainer.begin()
    trainer.accumulate(rows)


def finish(trainer: Trainer, rows: Sequence[Row] | None, progress: Progress | None = None) -> dict[str, float]:
    """Update the weights once, on these rows, which rank 0 has, and on those accumulated before: `Trainer.update`."""
    if not trainer.under_way:
        return trainer.update(rows, progress)
    trainer.accumulate(rows, progress)
    return trainer.finish(progress)


class EarlyRows:
    """The rows of a step that come before its rollout has ended.

    Args:
        waiting: empty.
        work: accumulates rows on all ranks.
    """

    def __init__(self, waiting: Waiting, work: Callable[[list[Row]], None]) -> None:
        self._waiting, self._work = waiting, work
        self._spans: list[tuple[float, float]] = []

    def add(self, rows: list[Row]) -> None:
        """Add the rows of a group, and have those that wait accumulated if they are enough."""
        if ready := self._waiting.add(rows):
            self.accumulate(ready)

    def accumulate(self, rows: list[Row]) -> None:
        """Have these rows accumulated at once."""
        started = time.monotonic()
        self._work(rows)
        self._spans.append((started, time.monotonic()))

    def rest(self) -> list[Row]:
        """Those that still wait."""
        return self._waiting.take()

    def hidden(self, ended: float) -> float:
        """Seconds of work before the rollout `ended`, by `time.monotonic`."""
        return sum(max(0.0, min(stop, ended) - start) for start, stop in self._spans)

    def __bool__(self) -> bool:
        return bool(self._spans)
