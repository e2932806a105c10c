"""To engines on CPUs: a gloo broadcast of the tensors one by one. `gloo_receiver` is the workers' end."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spell_megatron.rollout.addresses import address_towards, listen
from spell_megatron.rollout.transports.transport import Bucket, Meeting, Transport


def gloo_group(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: float,
    listener: socket.socket | None = None,
) -> dist.ProcessGroupGloo:
    """Joins a gloo group that stands beside torch.distributed's default group.

    Args:
        address, port: where rank 0 listens.
        rank: this process's rank; rank 0 passes its `listener`.
        world_size: number of processes in the group.
        timeout: seconds that the rendezvous and each collective may take.
    """
    limit = timedelta(seconds=timeout)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = limit
    # By default gloo takes the address that this host's name resolves to, which need not be one
    # that the others can reach, nor exist.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(address))]
    store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=listener is not None,
        timeout=limit,
        wait_for_workers=False,
        # The store closes the descriptor that it is given.
        master_listen_fd=None if listener is None else listener.detach(),
    )
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def broadcast(group: dist.ProcessGroupGloo, tensor: torch.Tensor) -> dist.Work:
    """Starts to send rank 0's values of a contiguous tensor to the others, in place.

    The values may be used, and on rank 0 be changed, after `wait`.
    """
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return group.broadcast([tensor.view(-1).view(torch.uint8)], options)


class GlooChannel:
    """Rank 0 of a group with the workers of all engines."""

    def __init__(self, meeting: Meeting) -> None:
        address, world_size, timeout = meeting.address, meeting.world_size, meeting.timeout
        listener = listen(address)
        port = listener.getsockname()[1]
        meeting.invite({"master_address": address, "master_port": port, "world_size": world_size, "timeout": timeout})
        self._group = gloo_group(address, port, 0, world_size, timeout, listener)

    def prepare(self, bucket: Bucket) -> dict[str, Any]:
        return {}

    def send(self, bucket: Bucket) -> None:
        # Straight from where the tensors are: to pack them takes nearly as long as to send them.
        sending = []
        for _, tensor in bucket:
            source = tensor.cpu().contiguous()
            sending.append((broadcast(self._group, source), source))
        for work, _ in sending:
            work.wait()

    def close(self) -> None:
        self._group.abort()


GLOO = Transport(
    "gloo",
    connect=GlooChannel,
    on_cpus=True,
    receiver="spell_megatron.rollout.transports.gloo_receiver:GlooReceiver",
)
