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

_GRAIN_S: Final = 0.05


@attrs.define(eq=False)
class _Waiter:
    """One in the line."""

    due_s: float = math.inf
    """When its patience ends."""
    bell: OneShotEvent = attrs.field(factory=OneShotEvent)
    is_in: bool = False
    has_left: bool = False


class Admission:
    """So many places, first come, first served.

    A semaphore with a deadline per waiter would do, but a cancel scope and a timer for each of ten thousand callers
    are a quarter of a million objects, and the garbage collector stops the loop to look at them all. Here a waiter is
    a future, and one timer serves the whole line.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._line: deque[_Waiter] = deque()
        self._patience: DelayQueue[_Waiter] = DelayQueue(_GRAIN_S)
        self._has_timer = False

    async def enter(self, deadline_s: float, start_soon: StartSoon) -> bool:
        """Return True once there is a place, which `leave` gives back; False when the deadline came first.

        *start_soon* starts the line's timer, once. Cancelling gives up the place in the line.
        """
        if self._free:
            self._free -= 1
            return True
        if anyio.current_time() >= deadline_s:
            return False
        if not self._has_timer:
            self._has_timer = True
            start_soon(self._end_patience)
        waiter = _Waiter()
        self._line.append(waiter)
        self._patience.plan(waiter, deadline_s)
        try:
            await waiter.bell.wait()
        except BaseException:
            if waiter.is_in:
                self.leave()
            raise
        finally:
            waiter.has_left = True
            self._patience.remove(waiter)
        return waiter.is_in

    def leave(self) -> None:
        """Give a place back: to the next in the line, if there is one."""
        while self._line:
            waiter = self._line.popleft()
            if not waiter.has_left:
                waiter.is_in = True
                waiter.bell.ring()
                return
        self._free += 1

    async def _end_patience(self) -> None:
        while True:
            await self._patience.until_due()
            waiter = self._patience.pop()
            if not waiter.is_in:
                waiter.has_left = True
                waiter.bell.ring()
