"""`OneShotEvent`: a one-time event for one waiting task, small enough for a million waiters."""

import asyncio
import math
import sys
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    import trio


def trio_lowlevel() -> Any | None:  # noqa: ANN401 - a module that may not be installed
    """Return `trio.lowlevel` if trio is fully imported. Another thread may be importing it now."""
    return getattr(sys.modules.get("trio"), "lowlevel", None)


def is_cancelled() -> bool:
    """Return whether this task is being cancelled. A cancelled future inside other code looks the same."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    try:
        task = asyncio.current_task()
    except RuntimeError:  # not on asyncio; on trio this cannot happen
        return True
    return task is None or task.cancelling() > 0


class OneShotEvent:
    """An event that is set once and awaited by one task, on the same event loop.

    It works on asyncio and trio. `anyio.Event` allows any number of waiters, but is five objects, and the garbage
    collector stops the event loop to visit each of them.
    """

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | trio.lowlevel.Task | None = None

    def set(self) -> None:
        """Wake the waiting task, now or when it starts to wait."""
        self._is_set = True
        waiter, self._waiter = self._waiter, None
        if isinstance(waiter, asyncio.Future):
            if not waiter.done():
                waiter.set_result(None)
        elif waiter is not None:
            sys.modules["trio"].lowlevel.reschedule(waiter)

    async def wait(self) -> None:
        """Return once the event is set. Cancelling ends the wait."""
        if self._is_set:
            return
        lowlevel = trio_lowlevel()
        if lowlevel is None or not lowlevel.in_trio_task():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            return
        self._waiter = lowlevel.current_task()

        def abort(_: object) -> "trio.lowlevel.Abort":
            self._waiter = None
            done: trio.lowlevel.Abort = lowlevel.Abort.SUCCEEDED
            return done

        await lowlevel.wait_task_rescheduled(abort)
