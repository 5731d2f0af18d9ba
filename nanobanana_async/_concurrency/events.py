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

    __slots__ = ("_is_rung", "_sleeper")

    def __init__(self) -> None:
        self._is_rung = False
        self._sleeper: asyncio.Future[None] | trio.lowlevel.Task | None = None

    def ring(self) -> None:
        """Wake who waits, now or later."""
        self._is_rung = True
        sleeper, self._sleeper = self._sleeper, None
        if isinstance(sleeper, asyncio.Future):
            if not sleeper.done():
                sleeper.set_result(None)
        elif sleeper is not None:
            sys.modules["trio"].lowlevel.reschedule(sleeper)

    async def wait(self) -> None:
        """Return once it has rung. Cancelling ends the waiting."""
        if self._is_rung:
            return
        lowlevel = trio_lowlevel()
        if lowlevel is None or not lowlevel.in_trio_task():
            self._sleeper = asyncio.get_running_loop().create_future()
            await self._sleeper
            return
        self._sleeper = lowlevel.current_task()

        def abort(_: object) -> "trio.lowlevel.Abort":
            self._sleeper = None
            done: trio.lowlevel.Abort = lowlevel.Abort.SUCCEEDED
            return done

        await lowlevel.wait_task_rescheduled(abort)
