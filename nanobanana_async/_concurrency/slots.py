"""`SlotPool`: a bounded number of slots, for any number of waiting callers with deadlines."""

import math
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias

import anyio
import attrs

from nanobanana_async._concurrency.delay_queue import DelayQueue
from nanobanana_async._concurrency.events import OneShotEvent

StartSoon: TypeAlias = Callable[[Callable[[], Coroutine[object, object, None]]], None]

_TIMER_SLACK_S: Final = 0.05


@attrs.define(eq=False, weakref_slot=False)
class SlotWaiter:
    """One caller that waits for a slot."""

    owner: str | None = None
    """Whom the slot is for, for a queue that takes turns."""
    due_s: float = math.inf
    """Deadline of the wait."""
    event: OneShotEvent | None = None
    acquired: bool = False
    has_left: bool = False
    number: int = 0
    """Place in the order of arrival, from 1, which it keeps if it waits again; 0 before it first waits."""

    def wake(self) -> None:
        """Wake the caller."""
        if self.event is not None:
            self.event.set()


class WaitQueue(Protocol):
    """Decides which waiter gets the next slot."""

    def attach(self, on_change: Callable[[], None]) -> None:
        """Call *on_change* whenever `pop` may return a waiter again, without a `push`."""
        ...

    def push(self, waiter: SlotWaiter) -> None:
        """Add a waiter. One that had a slot gets its old place, before all that arrived after it."""
        ...

    def pop(self) -> SlotWaiter | None:
        """Remove and return the next waiter that has not left; None if none may have a slot now."""
        ...


def insert_in_order(waiters: deque[SlotWaiter], waiter: SlotWaiter) -> None:
    """Insert *waiter* by its number, near one of the ends."""
    at = 0
    if not waiters or waiters[-1].number < waiter.number:
        waiters.append(waiter)
        return
    while waiters[at].number < waiter.number:
        at += 1
    waiters.insert(at, waiter)


class FifoWaitQueue:
    """First come, first served."""

    def attach(self, on_change: Callable[[], None]) -> None:
        """See `WaitQueue.attach`."""

    def __init__(self) -> None:
        self._waiters: deque[SlotWaiter] = deque()

    def push(self, waiter: SlotWaiter) -> None:
        """See `WaitQueue.push`."""
        insert_in_order(self._waiters, waiter)

    def pop(self) -> SlotWaiter | None:
        """See `WaitQueue.pop`."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.has_left:
                return waiter
        return None


class SlotPool:
    """A semaphore whose waiters have deadlines, and whose slots are objects.

    A cancel scope and a timer for each of ten thousand callers are a quarter of a million objects, and the garbage
    collector stops the event loop to visit them. Here a waiter is one future, and one timer serves all of them.

    Args:
        size: Number of slots.
        start_soon: Starts the shared timer in the background, once a caller waits with a deadline.
        queue: The order of the waiters; None means first come, first served.
    """

    def __init__(self, size: int, start_soon: StartSoon, queue: WaitQueue | None = None) -> None:
        self.free = size
        """Slots that are not taken. Negative while more are taken than there are since the last `resize`."""
        self.size = size
        """Number of slots."""
        self._arrived = 0
        self._start_soon = start_soon
        self._queue = queue or FifoWaitQueue()
        self._queue.attach(self._hand_out)
        self._deadlines: DelayQueue[SlotWaiter] = DelayQueue(_TIMER_SLACK_S)
        self._timer_started = False

    async def acquire(self, deadline_s: float = math.inf, waiter: SlotWaiter | None = None) -> "Slot":
        """Return a slot, to be used as a context manager. Cancelling gives up the place in the queue.

        *waiter* lets the caller follow its place in the queue. If it had a slot before, it gets its old place.

        Raises:
            TimeoutError: No slot was free by *deadline_s*, on the event loop's clock.
        """
        waiter = waiter or SlotWaiter()
        if not waiter.number:
            self._arrived += 1
            waiter.number = self._arrived
        waiter.acquired = waiter.has_left = False
        self._queue.push(waiter)
        self._hand_out()
        if waiter.acquired:
            return Slot(self._release)
        if anyio.current_time() >= deadline_s:
            waiter.has_left = True
            raise TimeoutError
        self._schedule_timeout(waiter, deadline_s)
        waiter.event = OneShotEvent()
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

    def _hand_out(self) -> None:
        while self.free > 0 and (waiter := self._queue.pop()) is not None:
            self.free -= 1
            waiter.acquired = True
            waiter.wake()

    def _release(self) -> None:
        self.free += 1
        self._hand_out()

    def resize(self, size: int) -> None:
        """Change the number of slots. Slots that are taken stay so."""
        self.free += size - self.size
        self.size = size
        self._hand_out()

    def _schedule_timeout(self, waiter: SlotWaiter, deadline_s: float) -> None:
        if deadline_s < math.inf:
            self._deadlines.schedule(waiter, deadline_s)
            if not self._timer_started:
                self._timer_started = True
                self._start_soon(self._expire_waiters)

    async def _expire_waiters(self) -> None:
        while True:
            await self._deadlines.wait_due()
            waiter = self._deadlines.pop()
            if not waiter.acquired:
                waiter.has_left = True
                waiter.wake()


class Slot:
    """One slot of a pool. It is free again once each of its holders has released it."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._callbacks = [give_back]
        self._holders = 1

    def share(self) -> Self:
        """Add a holder, such as work that outlives the caller. It calls `release`, too."""
        self._holders += 1
        return self

    def call_when_released(self, callback: Callable[[], None]) -> None:
        """Call *callback* once each holder has released it: for what is held as long as the slot."""
        self._callbacks.append(callback)

    def release(self) -> None:
        """Release it for one holder."""
        self._holders -= 1
        if not self._holders:
            for callback in reversed(self._callbacks):
                callback()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
