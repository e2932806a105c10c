"""Messages between two processes of this machine, over a socket: a struct, and arrays beside it, which are not copied.

There is no pickle: what comes is one of the structs that are expected, or an error.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

Message = TypeVar("Message")

_LENGTH = 8  # bytes of the number before each message, which says how long it is


class Channel(Generic[Message]):
    """One end of the connection. Any thread may send; one may receive.

    Args:
        connection: a stream.
        kinds: the union of the structs that come from the other end.
    """

    def __init__(self, connection: socket.socket, kinds: Any) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(tuple[kinds, list[tuple[str, list[int]]]]).decode

    def send(self, message: msgspec.Struct, arrays: Sequence[np.ndarray] = ()) -> None:
        """OSError: the other end is gone."""
        head = self._encode((message, [(array.dtype.str, array.shape) for array in arrays]))
        with self._lock:
            self._connection.sendall(len(head).to_bytes(_LENGTH) + head)
            for array in arrays:
                self._connection.sendall(_bytes(np.ascontiguousarray(array)))

    def receive(self) -> tuple[Message, list[np.ndarray]]:
        """EOFError: the other end is gone, or has closed the channel."""
        length = int.from_bytes(self._fill(bytearray(_LENGTH)))
        message, shapes = self._decode(self._fill(bytearray(length)))
        arrays = [np.empty(shape, np.dtype(kind)) for kind, shape in shapes]
        for array in arrays:
            self._fill(_bytes(array))
        return message, arrays

    def _fill(self, buffer: Any) -> Any:
        rest = memoryview(buffer)
        while len(rest):
            try:
                count = self._connection.recv_into(rest)
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError("the other end of the channel is gone")
            rest = rest[count:]
        return buffer

    def close(self) -> None:
        """Send nothing any more; the other end gets an EOFError once it has received what was sent."""
        with suppress(OSError):  # the other end is gone
            self._connection.shutdown(socket.SHUT_WR)


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
