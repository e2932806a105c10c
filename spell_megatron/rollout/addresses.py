"""This machine's addresses, as the engines need them to find the trainer."""

from __future__ import annotations

import socket


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
