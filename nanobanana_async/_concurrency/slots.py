"""`Admission`: a FIFO semaphore with deadlines, for submits that are being prepared and sent."""

import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Final, TypeAlias

import anyio
import attrs

from nanobanana_async._concurrency.delay_queue import DelayQueue
from nanobanana_async._concurrency.events import OneShotEvent

StartSoon: TypeAlias = Callable[[Callable[[], Coroutine[object, object, None]]], None]

_TIMER_SLACK_S: Final = 0.05


@attrs.define(eq=False)
class _Waiter:
    """One waiting caller."""

    due_s: float = math.inf
    """Deadline of the wait."""
    event: OneShotEvent = attrs.field(factory=OneShotEvent)
    acquired: bool = False
    cancelled: bool = False


class Admission:
    """A FIFO semaphore whose waiters have deadlines.

    A cancel scope and a timer for each of ten thousand callers are a quarter of a million objects, and the garbage
    collector stops the event loop to visit them. Here a waiter is one future, and one timer serves all of them.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiters: deque[_Waiter] = deque()
        self._deadlines: DelayQueue[_Waiter] = DelayQueue(_TIMER_SLACK_S)
        self._timer_started = False

    async def acquire(self, deadline_s: float, start_soon: StartSoon) -> bool:
        """Return True once a slot is acquired, which `release` gives back; False if the deadline comes first.

        *start_soon* starts the shared timer once. Cancelling gives up the place in the queue.
        """
        if self._free:
            self._free -= 1
            return True
        if anyio.current_time() >= deadline_s:
            return False
        if not self._timer_started:
            self._timer_started = True
            start_soon(self._expire_waiters)
        waiter = _Waiter()
        self._waiters.append(waiter)
        self._deadlines.schedule(waiter, deadline_s)
        try:
            await waiter.event.wait()
        except BaseException:
            if waiter.acquired:
                self.release()
            raise
        finally:
            waiter.cancelled = True
            self._deadlines.remove(waiter)
        return waiter.acquired

    def release(self) -> None:
        """Give a slot to the next waiter, or back to the pool."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.cancelled:
                waiter.acquired = True
                waiter.event.set()
                return
        self._free += 1

    async def _expire_waiters(self) -> None:
        while True:
            await self._deadlines.wait_due()
            waiter = self._deadlines.pop()
            if not waiter.acquired:
                waiter.cancelled = True
                waiter.event.set()
