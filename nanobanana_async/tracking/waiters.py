"""The waiters of tracked tasks, and their deadlines in one heap: ten thousand waiters have no timer each."""

import copy
from typing import Final

import anyio

from nanobanana_async._concurrency.delay_queue import DelayQueue
from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.tracking.state import TrackedTask, Waiter, timeout_error


class WaiterDeadlines:
    """Wakes each waiter whose deadline has passed, within *grain_s*."""

    def __init__(self, grain_s: float) -> None:
        self._queue: Final[DelayQueue[Waiter]] = DelayQueue(grain_s)

    def arm(self, tracked: TrackedTask, waiter: Waiter, deadline_s: float, timeout_s: float) -> OneShotEvent:
        """Return an event that is set at the next change. Raise the error that ended tracking, or TaskTimeout."""
        if tracked.error is not None:
            raise copy.copy(tracked.error)  # a copy per waiter: a shared one would collect all their tracebacks
        if anyio.current_time() < deadline_s:
            if waiter.due_s != deadline_s:
                self._queue.schedule(waiter, deadline_s)
            waiter.event = OneShotEvent()
            return waiter.event
        raise timeout_error(tracked, timeout_s)

    def remove(self, waiter: Waiter) -> None:
        """Forget the deadline of *waiter*."""
        self._queue.remove(waiter)

    async def run(self) -> None:
        """Wake each waiter whose deadline has passed, until cancelled."""
        while True:
            await self._queue.wait_due()
            self._queue.pop().wake()
