"""Who gets the next slot, also when some of those that wait give up."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from spell_megatron.rollout.slots import Slots


async def ticks(count):
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_lowest_priority_is_next_and_of_equal_ones_the_first():
    served = []

    async def use(slots, priority, name):
        async with slots.one(priority):
            served.append(name)
            await ticks(3)

    async def main():
        slots = Slots(2)
        async with asyncio.TaskGroup() as group:
            for name in ("5a", "7a", "5b", "1a", "5c", "1b", "0a"):
                group.create_task(use(slots, int(name[0]), name))

    asyncio.run(main())
    assert served == ["5a", "7a", "0a", "1a", "1b", "5b", "5c"]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(0, 12)), max_size=12))
def test_no_slot_is_lost_or_used_twice_whoever_gives_up(count, users):
    """Users have a priority, a time that they take, and a time at which they are cancelled if they have not ended."""
    used, ended = 0, []

    async def use(slots, number, priority, takes):
        nonlocal used
        async with slots.one(priority):
            used += 1
            assert used <= count
            try:
                await ticks(takes)
                ended.append(number)
            finally:
                used -= 1

    async def cancel(task, after):
        await ticks(after)
        task.cancel()

    async def main():
        slots = Slots(count)
        tasks = [asyncio.create_task(use(slots, i, *user[:2])) for i, user in enumerate(users)]
        given_up = [asyncio.create_task(cancel(task, user[2])) for task, user in zip(tasks, users, strict=True)]
        await asyncio.gather(*tasks, *given_up, return_exceptions=True)
        ended.clear()
        later = [asyncio.create_task(use(slots, i, 0, 2)) for i in range(2 * count)]
        await ticks(50)
        for task in later:
            task.cancel()
        assert len(ended) == 2 * count and not used

    asyncio.run(main())
