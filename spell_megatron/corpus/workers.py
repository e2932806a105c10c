"""Work on many batches in several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from spell_megatron.errors import UserError


def ordered_map(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map(function, items)` in several processes; takes few items ahead of the results.

    With one worker it works in this process.

    Raises:
        UserError: if a worker dies.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # spawn: a forked process would inherit the locks of running threads (progress bars, BLAS).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_leave_with_parent) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process died, most likely for lack of memory. Run the same command again with fewer "
                "--workers: what is finished is not repeated."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _leave_with_parent() -> None:
    """Ignore Ctrl-C, which the parent handles, and end when the parent ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
