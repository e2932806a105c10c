"""Many jobs at a time that end together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any


async def run_all(jobs: AsyncIterator[Coroutine[Any, Any, None]], at_once: int) -> None:
    """Run jobs, as many at once as allowed; the iterator is at most one job ahead.

    The first error ends all jobs and is raised.
    """
    room = asyncio.Semaphore(at_once)
    try:
        async with asyncio.TaskGroup() as group:
            async for job in jobs:
                try:
                    await room.acquire()
                except asyncio.CancelledError:
                    job.close()  # Python warns of a coroutine that has never run
                    raise
                group.create_task(job).add_done_callback(lambda _: room.release())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
