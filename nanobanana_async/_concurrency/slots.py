"""`Admission`: how many submits are being prepared and sent at once, and the line of those who wait for that."""

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
    """One in the line."""

    due_s: float = math.inf
    """When its patience ends."""
    event: OneShotEvent = attrs.field(factory=OneShotEvent)
    acquired: bool = False
    cancelled: bool = False


class Admission:
    """So many places, first come, first served.

    A semaphore with a deadline per waiter would do, but a cancel scope and a timer for each of ten thousand callers
    are a quarter of a million objects, and the garbage collector stops the loop to look at them all. Here a waiter is
    a future, and one timer serves the whole line.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiters: deque[_Waiter] = deque()
        self._deadlines: DelayQueue[_Waiter] = DelayQueue(_TIMER_SLACK_S)
        self._timer_started = False

    async def acquire(self, deadline_s: float, start_soon: StartSoon) -> bool:
        """Return True once there is a place, which `leave` gives back; False when the deadline came first.

        *start_soon* starts the line's timer, once. Cancelling gives up the place in the line.
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
        """Give a place back: to the next in the line, if there is one."""
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
