"""Weights travel in buckets, so that neither side ever holds more than a few of them beside its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from spell_megatron.rollout.transports.transport import Bucket

BUCKET_BYTES = 64 << 20
"""Size of a bucket on CPUs, and the least on GPUs. A tensor that is larger has a bucket of its own."""
MOST_BUCKET_BYTES = 4 << 30
TRAINER_SHARE, ENGINE_SHARE = 8, 4
"""A bucket takes at most one part in so many of the memory that is free on a GPU.

At one time a trainer rank holds two buckets on their way, the tensors made of a third, one that is being sent and,
where it shares the GPU with an engine, the engine's copy of it and the layer into which that is loaded. An engine
elsewhere holds two buckets and a layer.
"""


def fitting(trainer: int, engine: int | None) -> int:
    """Size of a bucket for GPUs that have so many bytes free: the fullest of the trainer's, and of the engines' own."""
    room = trainer // TRAINER_SHARE if engine is None else min(trainer // TRAINER_SHARE, engine // ENGINE_SHARE)
    return max(BUCKET_BYTES, min(MOST_BUCKET_BYTES, room))


def in_buckets(stream: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """A stream of (name, tensor), cut into buckets of at most `bucket_bytes`."""
    bucket: Bucket = []
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket
