"""Requests to stop, which come as signals.

Slurm signals every process of a job's step, and Ctrl-C every process in the foreground of a terminal: also those that
know nothing of a request and would end by it, such as the writers of a checkpoint, on which the answer to the request
depends. So a process that answers requests blocks them: what it starts inherits that, and goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; the end of a job, or preemption; the limit of a job's time is near."""


def expect_requests() -> None:
    """Until requests are answered: keep SIGUSR1, which would end this process, and let the others end it.

    To be called before this process has threads. The process that started it may have blocked the others.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


@contextmanager
def answering(answer: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Have requests answered, and kept from all processes that are started meanwhile. For the main thread.

    Args:
        answer: called with each request, in a thread of its own, also while the main thread is in a library.
    """

    def listen() -> None:
        while not ended.is_set():
            number = signal.sigwait(requests)
            if not ended.is_set():
                answer(signal.Signals(number))

    ended, listener = threading.Event(), threading.Thread(target=listen, name="requests", daemon=True)
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by a shell, for what it starts in the background
    requests = [number for number in REQUESTS if not (ignored and number is signal.SIGINT)]
    resource_tracker.ensure_running()  # it would unblock signals again when it is started
    # Threads from before do not block requests. Python then calls the handler in the main thread.
    handlers = {one: signal.signal(one, lambda number, _: answer(signal.Signals(number))) for one in requests}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, requests)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        signal.pthread_kill(listener.ident or 0, signal.SIGUSR1)
        listener.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def given_on() -> Iterator[None]:
    """Have SIGINT and SIGTERM end the processes that are started meanwhile, as they end any program."""
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
