"""What both ends of a weight transfer share: the process group and the checksum.

Imports neither vLLM nor Megatron, so that the trainer need not import the former.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit integer


def listen(address: str) -> socket.socket:
    """Opens a listening socket on a free port of one address (a store would listen on all)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen()
    return listener


def address_towards(host: str) -> str:
    """This machine's own address on the way to a host."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket sends nothing by this
        return probe.getsockname()[0]


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


def checksum(tensor: torch.Tensor) -> str:
    """Dtype, shape and a 64-bit checksum of a tensor's bits, the same on every device.

    The checksum is the sum over i of word_i * (2 i + 1) * c mod 2^64, with the bits read as 32-bit words (bytes,
    where they are not a multiple of 32 bits): it changes when words change or change places.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()  # words have to lie at multiples of their size
    words = flat.view(torch.int32) if len(flat) % 4 == 0 else flat
    # Fits a CPU's cache; on other devices the number of calls counts.
    length = 1 << 16 if words.device.type == "cpu" else 1 << 24
    factors = (2 * torch.arange(min(length, len(words)), device=words.device) + 1) * _MULTIPLIER
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), length):
        chunk = words[start : start + length].to(torch.int64)
        # The factors of this chunk are those of the first one, moved by 2 * start * c (as a signed integer).
        moved = (2 * start * _MULTIPLIER + (1 << 63)) % (1 << 64) - (1 << 63)
        total += (chunk * factors[: len(chunk)]).sum() + chunk.sum() * moved
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{int(total) % (1 << 64):016x}"
