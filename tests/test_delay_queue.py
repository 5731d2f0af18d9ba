"""`DelayQueue` orders items by due time and forgets removed ones."""

import math

import anyio
import attrs
import pytest

from nanobanana_async._concurrency.delay_queue import DelayQueue

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@attrs.define(eq=False)
class Item:
    """An item with a due time."""

    due_s: float = math.inf


def test_items_come_in_the_order_of_their_due_times() -> None:
    """An item that is scheduled again counts with its last due time."""
    queue: DelayQueue[Item] = DelayQueue(slack_s=0.1)
    items = [Item() for _ in range(3)]
    for item, due_s in zip(items, (3.0, 1.0, 2.0), strict=True):
        queue.schedule(item, due_s)
    queue.schedule(items[1], 4.0)
    order = []
    while queue.next_due_s() < math.inf:
        order.append(items.index(queue.pop()))
    assert order == [2, 0, 1]


def test_removed_items_do_not_stay_in_memory() -> None:
    """Twenty thousand items that were scheduled and removed leave a small heap."""
    queue: DelayQueue[Item] = DelayQueue(slack_s=0.1)
    for number in range(20_000):
        item = Item()
        queue.schedule(item, float(number))
        queue.remove(item)
    assert len(queue) < 200
    assert queue.next_due_s() == math.inf


async def test_an_earlier_item_shortens_the_wait() -> None:
    """A wait for a late item returns when an earlier one is due."""
    queue: DelayQueue[Item] = DelayQueue(slack_s=0.1)
    queue.schedule(Item(), anyio.current_time() + 1000)
    began_s = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(queue.wait_due)
        await anyio.sleep(1)
        queue.schedule(Item(), anyio.current_time() + 5)
    assert anyio.current_time() - began_s == pytest.approx(6, abs=0.2)
