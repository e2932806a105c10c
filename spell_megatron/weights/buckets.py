"""Weights travel in buckets, so that neither side ever holds more than a few of them beside its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from spell_megatron.rollout.transports.transport import Bucket

BUCKET_BYTES = 64 << 20
"""Size of a bucket. A tensor that is larger has a bucket of its own."""


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
