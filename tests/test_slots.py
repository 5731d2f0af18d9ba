"""`SlotPool` and `ByteBudget`: what is acquired is given back once, whether its caller waits, cancels or shares."""

import contextlib
import random

import anyio
import pytest

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.byte_budget import ByteBudget
from nanobanana_async._concurrency.slots import SlotPool
from tests.tracker_fakes import slot_pool

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_slot_is_free_once_each_holder_has_released_it() -> None:
    """A caller and the work that outlives it hold one slot together."""
    pool = slot_pool(1)
    with await pool.acquire() as slot:
        work = slot.share()
    assert pool.free == 0
    work.release()
    assert pool.free == 1


async def test_slots_are_given_in_the_order_of_waiting() -> None:
    """First come, first served."""
    pool, order = slot_pool(1), list[int]()

    async def wait(number: int) -> None:
        with await pool.acquire():
            order.append(number)

    first = await pool.acquire()
    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(wait, number)
            await anyio.sleep(0.1)
        assert order == []
        first.release()
    assert order == [0, 1, 2, 3, 4]


async def test_a_wait_ends_at_its_deadline() -> None:
    """One timer serves all waiters, and a slot that comes too late goes to the next one."""
    background = BackgroundTaskGroup()
    await background.ensure_started()
    pool = SlotPool(1, background.start_soon)
    with await pool.acquire():
        start_s = anyio.current_time()
        for wait_s in (3, 1, 2):
            with pytest.raises(TimeoutError):
                await pool.acquire(anyio.current_time() + wait_s)
        assert 6 <= anyio.current_time() - start_s <= 6.5
        with pytest.raises(TimeoutError):
            await pool.acquire(anyio.current_time())
    assert pool.free == 1
    await background.aclose(drain_s=0)


async def test_any_mix_of_waits_and_cancels_gives_every_slot_back() -> None:
    """Also if a slot and a cancellation arrive together."""
    background, rng = BackgroundTaskGroup(), random.Random(7)
    await background.ensure_started()
    pool, most = SlotPool(3, background.start_soon), 0

    async def use() -> None:
        nonlocal most
        await anyio.sleep(rng.random())
        with anyio.move_on_after(rng.random()), contextlib.suppress(TimeoutError):
            slot = await pool.acquire(anyio.current_time() + rng.random())
            most = max(most, 3 - pool.free)
            with slot:
                await anyio.sleep(rng.random() / 10)

    async with anyio.create_task_group() as group:
        for _ in range(200):
            group.start_soon(use)
    assert (pool.free, most) == (3, 3)
    await background.aclose(drain_s=0)


async def test_bytes_are_bounded_and_given_back() -> None:
    """A request above the total is served alone, and a cancelled one does not block those behind it."""
    budget, rng, held, most = ByteBudget(100), random.Random(7), 0, 0

    async def use() -> None:
        nonlocal held, most
        size = rng.choice([1, 30, 60, 1000])
        with anyio.move_on_after(rng.random() * 5), budget.lease() as lease:
            await lease.resize(size)
            await lease.resize(size)
            held += min(size, 100)
            most = max(most, held)
            try:
                await anyio.sleep(rng.random() / 10)
            finally:
                held -= min(size, 100)

    async with anyio.create_task_group() as group:
        for _ in range(200):
            group.start_soon(use)
    assert most <= 100
    assert await budget.acquire(100) == 100
