"""`OneShotEvent`: wakes one task, once. A waiter among a million costs one future, not an event with a queue in it."""

import asyncio
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio


def trio_lowlevel() -> Any | None:  # noqa: ANN401 - a module that need not be installed
    """Return `trio.lowlevel` if trio is loaded, and whole: another thread may be half way through importing it."""
    return getattr(sys.modules.get("trio"), "lowlevel", None)


class OneShotEvent:
    """Rung once, from the same event loop; waited for by one task. On asyncio and on trio.

    `anyio.Event` does the same for any number of tasks, and is five objects; the garbage collector stops the loop to
    look at each.
    """

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | trio.lowlevel.Task | None = None

    def set(self) -> None:
        """Wake who waits, now or later."""
        self._is_set = True
        sleeper, self._waiter = self._waiter, None
        if isinstance(sleeper, asyncio.Future):
            if not sleeper.done():
                sleeper.set_result(None)
        elif sleeper is not None:
            sys.modules["trio"].lowlevel.reschedule(sleeper)

    async def wait(self) -> None:
        """Return once it has rung. Cancelling ends the waiting."""
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
