"""Event loops whose clock jumps to the next timer when idle, so that an hour takes milliseconds.

Use them with in-memory transports only: the clock does not wait for sockets or threads.
"""

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any

import sniffio
import trio.lowlevel
import trio.testing


class _JumpingSelector(selectors.DefaultSelector):
    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not events and timeout:
            self.loop.now_s += timeout
        elif not events and timeout is None:
            raise RuntimeError("deadlock: nothing is ready, and no timer is set")
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop in virtual time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the virtual time."""
        return self.now_s


def backend_options(name: str) -> Mapping[str, Any]:
    """Return the options that make anyio run *name* in virtual time."""
    if name == "trio":
        return {"clock": trio.testing.MockClock(autojump_threshold=0)}
    return {"loop_factory": VirtualLoop}


def jump(seconds: float) -> None:
    """Advance the clock while the loop stands still, as after a suspend."""
    if sniffio.current_async_library() == "trio":
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.now_s += seconds
