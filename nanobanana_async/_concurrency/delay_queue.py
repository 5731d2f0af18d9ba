"""`DelayQueue`: items with a due time, for one coroutine to wait on, whatever their number."""

import heapq
import itertools
import math
from typing import Final, Generic, Protocol, TypeVar

import anyio


class Delayed(Protocol):
    """An item with a due time."""

    due_s: float
    """Due time on the event loop's clock; infinity if it is not scheduled."""


T = TypeVar("T", bound=Delayed)


class DelayQueue(Generic[T]):
    """Items ordered by due time, earliest first.

    Deletion is lazy. An entry whose time differs from its item's `due_s` is stale. It is dropped when it reaches the
    head, or when stale entries are most of the heap. Every operation is O(log n), and a removed item is released soon.

    `wait_due` sleeps for at least *slack_s* seconds, and items that become due meanwhile are served together. Requests
    sent together cost a third of the CPU of single ones (`benchmarks/polls.py`).
    """

    def __init__(self, slack_s: float) -> None:
        self._slack_s = slack_s
        self._heap: list[tuple[float, int, T]] = []
        self._scheduled = 0
        self._counter = itertools.count()
        self._head_changed = anyio.Event()
        self.wakeups = 0
        """Number of times that `wait_due` woke up."""

    def __len__(self) -> int:
        return len(self._heap)

    def schedule(self, item: T, due_s: float) -> None:
        """Insert *item* or change its due time. With infinity, remove it."""
        if item.due_s < math.inf:
            self._scheduled -= 1
        item.due_s = due_s
        if due_s < math.inf:
            self._scheduled += 1
            heapq.heappush(self._heap, (due_s, next(self._counter), item))
            if self._heap[0][2] is item:
                self._head_changed.set()
        if len(self._heap) > 2 * self._scheduled + _COMPACT_AFTER:
            self._heap = [entry for entry in self._heap if entry[0] == entry[2].due_s]
            heapq.heapify(self._heap)

    def remove(self, item: T) -> None:
        """Remove *item* if it is scheduled."""
        self.schedule(item, math.inf)

    def next_due_s(self) -> float:
        """Return the due time of the first item; infinity if the queue is empty."""
        while self._heap and self._heap[0][0] != self._heap[0][2].due_s:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> T:
        """Remove and return the first item. Call it right after `wait_due` or `next_due_s`."""
        item = heapq.heappop(self._heap)[2]
        item.due_s = math.inf
        self._scheduled -= 1
        return item

    def count_overdue(self, now_s: float) -> int:
        """Return the number of items due before *now_s*. O(n): for statistics only."""
        heap = list(self._heap)  # one step, for a caller in another thread
        return sum(due_s < now_s and due_s == item.due_s for due_s, _, item in heap)

    async def wait_due(self) -> None:
        """Return when the first item is due, at most *slack_s* later."""
        while (wait_s := self.next_due_s() - anyio.current_time()) > 0:
            self._head_changed = anyio.Event()
            with anyio.move_on_after(max(wait_s, self._slack_s)):
                await self._head_changed.wait()
            self.wakeups += 1


_COMPACT_AFTER: Final = 100
"""Number of stale entries below which the heap is not rebuilt."""
