"""`DelayQueue`: what is due when, for one coroutine to sleep on, whatever the number of items."""

import heapq
import itertools
import math
from typing import Final, Generic, Protocol, TypeVar

import anyio


class Delayed(Protocol):
    """Something that is due."""

    due_s: float
    """When, on the event loop's clock; infinity for never."""


T = TypeVar("T", bound=Delayed)


class DelayQueue(Generic[T]):
    """What is due, the earliest first.

    Deletion is lazy: an item whose time is no longer its own is stale, and is dropped when it is met, or when stale
    items are most of the heap. So everything costs O(log n), whoever leaves, and nobody is kept alive by it for long.

    Once asleep, it sleeps for *slack_s* seconds at least, and what falls due meanwhile is served together: a request
    that leaves in company costs a third of the CPU of a lone one (`benchmarks/polls.py`).
    """

    def __init__(self, slack_s: float) -> None:
        self._slack_s = slack_s
        self._heap: list[tuple[float, int, T]] = []
        self._scheduled = 0
        self._counter = itertools.count()
        self._head_changed = anyio.Event()
        self.wakeups = 0
        """Times that `wait_due` woke up."""

    def __len__(self) -> int:
        return len(self._heap)

    def schedule(self, item: T, due_s: float) -> None:
        """Put *item* in, or move it; with infinity, take it out."""
        self._scheduled += (due_s < math.inf) - (item.due_s < math.inf)
        item.due_s = due_s
        if due_s < math.inf:
            heapq.heappush(self._heap, (due_s, next(self._counter), item))
            if self._heap[0][2] is item:
                self._head_changed.set()
        if len(self._heap) > 2 * self._scheduled + _COMPACT_AFTER:
            self._heap = [entry for entry in self._heap if entry[0] == entry[2].due_s]
            heapq.heapify(self._heap)

    def remove(self, item: T) -> None:
        """Take *item* out, if it is in."""
        self.schedule(item, math.inf)

    def next_due_s(self) -> float:
        """Return when the first item is due; infinity when there is none."""
        while self._heap and self._heap[0][0] != self._heap[0][2].due_s:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> T:
        """Take out the first item. Only right after `wait_due` or `next_due_s`, for it must not be stale."""
        item = heapq.heappop(self._heap)[2]
        item.due_s = math.inf
        self._scheduled -= 1
        return item

    def count_overdue(self, now_s: float) -> int:
        """Count the items that are overdue at *now_s*. O(n): for statistics only."""
        return sum(due_s < now_s and due_s == item.due_s for due_s, _, item in self._heap)

    async def wait_due(self) -> None:
        """Return when the first item is due, or at most the grain later."""
        while (wait_s := self.next_due_s() - anyio.current_time()) > 0:
            self._head_changed = anyio.Event()
            with anyio.move_on_after(max(wait_s, self._slack_s)):
                await self._head_changed.wait()
            self.wakeups += 1


_COMPACT_AFTER: Final = 100
"""Stale items that are not worth a sweep."""
