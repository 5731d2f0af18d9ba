"""`SlotPool`: a bounded number of slots, for any number of waiting callers with deadlines."""

import math
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Final, Self, TypeAlias

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
    has_left: bool = False


class SlotPool:
    """A FIFO semaphore whose waiters have deadlines, and whose slots are objects.

    A cancel scope and a timer for each of ten thousand callers are a quarter of a million objects, and the garbage
    collector stops the event loop to visit them. Here a waiter is one future, and one timer serves all of them.

    Args:
        size: Number of slots.
        start_soon: Starts the shared timer in the background, once a caller waits with a deadline.
    """

    def __init__(self, size: int, start_soon: StartSoon) -> None:
        self.free = size
        """Slots that are not taken."""
        self._start_soon = start_soon
        self._waiters: deque[_Waiter] = deque()
        self._deadlines: DelayQueue[_Waiter] = DelayQueue(_TIMER_SLACK_S)
        self._timer_started = False

    async def acquire(self, deadline_s: float = math.inf) -> "Slot":
        """Return a slot, to be used as a context manager. Cancelling gives up the place in the queue.

        Raises:
            TimeoutError: No slot was free by *deadline_s*, on the event loop's clock.
        """
        if self.free:
            self.free -= 1
            return Slot(self._release)
        if anyio.current_time() >= deadline_s:
            raise TimeoutError
        waiter = _Waiter()
        self._waiters.append(waiter)
        if deadline_s < math.inf:
            self._deadlines.schedule(waiter, deadline_s)
            if not self._timer_started:
                self._timer_started = True
                self._start_soon(self._expire_waiters)
        try:
            await waiter.event.wait()
        except BaseException:
            if waiter.acquired:
                self._release()
            raise
        finally:
            waiter.has_left = True
            self._deadlines.remove(waiter)
        if not waiter.acquired:
            raise TimeoutError
        return Slot(self._release)

    def _release(self) -> None:
        """Give a slot to the next waiter, or back to the pool."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.has_left:
                waiter.acquired = True
                waiter.event.set()
                return
        self.free += 1

    async def _expire_waiters(self) -> None:
        while True:
            await self._deadlines.wait_due()
            waiter = self._deadlines.pop()
            if not waiter.acquired:
                waiter.has_left = True
                waiter.event.set()


class Slot:
    """One slot of a pool. It is free again once each of its holders has released it."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._holders = 1

    def share(self) -> Self:
        """Add a holder, such as work that outlives the caller. It calls `release`, too."""
        self._holders += 1
        return self

    def release(self) -> None:
        """Release it for one holder."""
        self._holders -= 1
        if not self._holders:
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
