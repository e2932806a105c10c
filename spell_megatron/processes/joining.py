"""The process group of a trainer that srun has started: its processes find each other by a rendezvous."""

from __future__ import annotations

import os
from datetime import timedelta

from spell_megatron.errors import UserError
from spell_megatron.processes.collective import TENSOR_LIMIT
from spell_megatron.processes.rendezvous import Rendezvous
from spell_megatron.ranks import ALONE, launched

_SECONDS = 600.0
"""How much later than the first the last process may start."""
_STORE = "trainer"


def join(device: str, rendezvous: Rendezvous) -> None:
    """Make torch.distributed's default process group of the trainer processes that srun has started.

    Rank 0 listens on a port that its machine gives it, and publishes it. A single process needs none of this:
    `backend.initialise` makes its group.

    Args:
        device: run.device.

    Raises:
        UserError: rank 0 does not publish its address, or cannot be reached at it.
    """
    rank, world_size, _ = launched() or ALONE
    if world_size == 1:
        return
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=_SECONDS)
    cuda = device != "cpu" and torch.cuda.is_available()
    if interface := _interface(rendezvous.address()):
        # gloo would take the address that this host's name resolves to, which the others may not reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if rank == 0:
        address = rendezvous.address()
        store = dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False, timeout=limit)
        rendezvous.publish(_STORE, {"address": address, "port": store.port})
    else:
        place = rendezvous.wait(_STORE, _SECONDS)
        try:
            store = dist.TCPStore(place["address"], place["port"], world_size, is_master=False, timeout=limit)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"This process cannot reach rank 0 of the trainer at {place['address']}:{place['port']} ({error}). "
                "The nodes of a job must reach each other on all ports; if they have several networks, NodeAddr in "
                "`scontrol show node` must be an address of one that connects them."
            ) from error
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TENSOR_LIMIT)


def _interface(address: str) -> str:
    """Name of this machine's network interface that has an address; "" if none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            return name
    return ""
