"""Output that somebody may have stopped to read: a closed pipe, as in `spell status RUN | head -1`."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from typing import IO, Any


def end_unread() -> bool:
    """Whether a reader of standard output or standard error has gone; then Python does not try to write there again."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _reader_has_gone(stream)]
    for stream in gone:
        silence(stream)
    return bool(gone)


def _reader_has_gone(stream: IO[Any]) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # it has no descriptor, or is closed
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def silence(stream: IO[Any]) -> None:
    """Send what is still written to a stream to nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
