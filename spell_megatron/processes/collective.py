"""Values that trainer processes exchange, besides tensors."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def from_rank_0(value: Value) -> Value:
    """The value of rank 0, on all ranks. Every rank calls it; what the others pass is not used.

    Values are pickled. Without a process group there is only this process, whose value is returned.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
