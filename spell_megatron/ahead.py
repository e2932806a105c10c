"""One step off (`training.staleness: 1`): the engines write the batch after the next update while the trainer works.

The weights change only between two rollouts, when nothing is under way. Then the next batch is whole, and a checkpoint
holds it: after a resume the next rollout begins with the weights, the batch and the history that it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spell_megatron.errors import UserError
from spell_megatron.rollout.transports.transport import Transport
from spell_megatron.training.prefix_tree import Row


@dataclass
class Batch:
    """What a rollout has written for one update.

    Attributes:
        step: number of the update.
        version: updates that the weights had had which wrote it.
        rows: those that are left to train on.
        metrics: of the rollout.
        empty: there was nothing to train on.
    """

    step: int
    version: int
    rows: list[Row]
    metrics: dict[str, float]
    empty: bool

    def record(self) -> dict[str, Any]:
        """All but the rows, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

    @classmethod
    def restored(cls, record: Mapping[str, Any], rows: list[Row]) -> Batch:
        """The batch with a record and its rows."""
        return cls(rows=rows, **record)


def check_gpus(staleness: int, transport: Transport) -> None:
    """Trainer and engines that are to work at the same time share no GPUs.

    Raises:
        UserError: they do, and have them in turns.
    """
    if staleness and transport.colocated:
        raise UserError(
            "training.staleness is 1: trainer and engines would work at the same time. But here they share "
            "GPUs, which each of them has in its turn. Set training.staleness to 0, or give the engines GPUs of their "
            "own."
        )
