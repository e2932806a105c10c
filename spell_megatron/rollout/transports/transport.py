"""What a transport is: a way for weights to reach the engines, and all that it implies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Bucket = list[tuple[str, torch.Tensor]]
"""(Hugging Face name, whole tensor) of some of the weights."""


class Channel(Protocol):
    """The trainer's end of a transport. Buckets are prepared and sent one after the other."""

    def prepare(self, bucket: Bucket) -> dict[str, Any]:
        """Returns what the engines are told about a bucket beside names, dtypes and shapes."""

    def send(self, bucket: Bucket) -> None:
        """Sends a bucket that has been announced to the engines; runs in a thread of its own."""

    def close(self) -> None:
        """Ends the connection. A `send` that is under way then fails."""


@dataclass(frozen=True)
class Meeting:
    """How rank 0 of the trainer and the workers of all engines get together.

    Attributes:
        invite: sends an init_info to vLLM's /init_weight_transfer_engine in every engine, without waiting for the
            answers. If it has a `world_size`, each engine's `rank_offset` is added to it.
        address: an address of this machine that the engines reach.
        world_size: rank 0 and the workers of all engines.
        timeout: seconds that the meeting and each collective may take.
        bucket_bytes: largest size of a bucket.
    """

    invite: Callable[[dict[str, Any]], None]
    address: str
    world_size: int
    timeout: float
    bucket_bytes: int


@dataclass(frozen=True)
class Transport:
    """A way for weights to reach the engines.

    Attributes:
        name: vLLM's name of it (the `backend` of --weight-transfer-config).
        connect: makes the channel of the trainer's rank 0.
        join: makes the channel of the other trainer ranks, which then prepare the same buckets; None: only rank 0
            sends.
        on_cpus: the engines run on CPUs.
        colocated: the engines share their GPUs with the trainer, so they free their memory during updates.
        environment: environment variables that the servers need for it.
        receiver: "module:class" of the workers' end, where vLLM has none of that name.
    """

    name: str
    connect: Callable[[Meeting], Channel]
    join: Callable[[], Channel] | None = None
    on_cpus: bool = False
    colocated: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    receiver: str = ""
