"""`ByteBudget`: a bound on the bytes that many tasks hold in memory together."""

from collections import deque
from types import TracebackType
from typing import Self

import anyio


class ByteBudget:
    """At most *total_bytes* at once, first come, first served. A larger request is served alone."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._free = total_bytes
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    def lease(self) -> "ByteLease":
        """Return a lease of no bytes yet. Leaving its `with` block gives its bytes back."""
        return ByteLease(self)

    async def acquire(self, size_bytes: int) -> int:
        """Return the number of bytes acquired, once they are free: *size_bytes*, or the total if that is less."""
        size_bytes = min(size_bytes, self._total)
        if not self._waiting and size_bytes <= self._free:
            self._free -= size_bytes
            return size_bytes
        granted = anyio.Event()
        self._waiting.append((size_bytes, granted))
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():
                self.release(size_bytes)
            else:
                self._waiting.remove((size_bytes, granted))
                self.release(0)
            raise
        return size_bytes

    def release(self, size_bytes: int) -> None:
        """Give *size_bytes* back, and serve the waiting tasks that now fit."""
        self._free += size_bytes
        while self._waiting and self._waiting[0][0] <= self._free:
            size_bytes, granted = self._waiting.popleft()
            self._free -= size_bytes
            granted.set()


class ByteLease:
    """Bytes that one task holds."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held_bytes = 0

    async def resize(self, size_bytes: int) -> None:
        """Hold *size_bytes* instead of what is held. Waits without holding any, so that two leases cannot deadlock."""
        self.release()
        self._held_bytes = await self._budget.acquire(size_bytes)

    def release(self) -> None:
        """Hold nothing any more."""
        self._budget.release(self._held_bytes)
        self._held_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
