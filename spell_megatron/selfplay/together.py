"""Coroutines that run together and fail together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from spell_megatron.errors import UserError

T = TypeVar("T")


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines together; when one fails, cancel the others and raise its error as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failed:
        user_errors = [error for error in failed.exceptions if isinstance(error, UserError)]
        raise (user_errors or failed.exceptions)[0] from None
    return [task.result() for task in tasks]
