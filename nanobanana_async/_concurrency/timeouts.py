"""`run_within`: a time limit that a stopped process does not use up."""

from collections.abc import Awaitable, Callable
from typing import Final

import anyio

_LATE_S: Final = 1.0
"""A timer that fires this late shows that the process, or its event loop, was stopped meanwhile."""
_LAST_LOOK_S: Final = 5.0
"""Time for what has arrived meanwhile, such as a response in a socket."""


async def run_within(timeout_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Run *work*, which must not raise, and cancel it after *timeout_s*.

    If the process was stopped when the time was up (Ctrl-Z, `docker pause`, a blocked event loop), *work* gets five
    more seconds.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_after, timeout_s, group.cancel_scope)
        await work()
        group.cancel_scope.cancel()


async def _cancel_after(timeout_s: float, scope: anyio.CancelScope) -> None:
    due_s = anyio.current_time() + timeout_s
    await anyio.sleep_until(due_s)
    if anyio.current_time() - due_s > _LATE_S:
        await anyio.sleep(_LAST_LOOK_S)
    scope.cancel()
