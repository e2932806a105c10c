"""What trainer processes tell each other besides tensors.

These messages have a gloo group of their own. Ranks wait in it for rank 0 during rollouts, validations and starts of
engines, which can take an hour. NCCL would not do: its watchdog ends a process that waits for longer than the group's
limit (10 minutes by default), and a rank that waits in an NCCL kernel keeps its GPU busy.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")

MESSAGE_LIMIT = timedelta(days=2)
"""How long a rank waits for a message. The death of a process ends the wait at once: its connections close."""

TENSOR_LIMIT = timedelta(hours=1)
"""How long a rank waits in a collective of tensors. In a push it waits for rank 0, and rank 0 for the engines."""

_groups: list[dist.ProcessGroup] = []


def from_rank_0(value: Value) -> Value:
    """The value of rank 0, on all ranks. Every rank calls it; what the others pass is not used.

    Values are pickled. Without a process group there is only this process, whose value is returned.
    """
    if _alone():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_messages())
    return values[0]


def from_all(value: Value) -> list[Value]:
    """The values of all ranks in order, on all ranks. Every rank calls it."""
    if _alone():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_messages())
    return values


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective, or the store, failed because another process has ended."""
    return isinstance(error, dist.DistNetworkError) or "gloo/transport" in str(error) or "ncclRemoteError" in str(error)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def _messages() -> dist.ProcessGroup:
    """The group of the messages; the first call of all ranks makes it."""
    if not _groups or _groups[0] not in dist.distributed_c10d._world.pg_map:  # the processes have parted since
        _groups[:] = [dist.new_group(backend="gloo", timeout=MESSAGE_LIMIT)]
    return _groups[0]
