"""`Turn`: the slot of one submit, which it gives back while it waits for the service, and takes again."""

from types import TracebackType
from typing import Final, Self

from nanobanana_async._concurrency.slots import Slot, SlotPool, SlotWaiter
from nanobanana_async.api.fair_queue import FairQueue


class Turn:
    """The place of one submit in line, and its slot. A context manager that releases the slot.

    *slot* is the one that was acquired with *waiter*, by *deadline_s* on the event loop's clock.
    """

    def __init__(self, pool: SlotPool, queue: FairQueue, waiter: SlotWaiter, slot: Slot, deadline_s: float) -> None:
        self._pool = pool
        self._queue = queue
        self._waiter = waiter
        self.slot: Slot | None = slot
        """The slot; None between `give_back` and `take`."""
        self.deadline_s: Final = deadline_s

    def give_back(self) -> None:
        """Release the slot. The submit was not accepted, and keeps its place in line."""
        if self.slot is not None:
            slot, self.slot = self.slot, None
            slot.release()
            self._queue.give_back(self._waiter)

    async def take(self) -> None:
        """Wait for a slot, before all submits that arrived later.

        Raises:
            TimeoutError: No slot was free by the deadline.
        """
        self.slot = await self._pool.acquire(self.deadline_s, self._waiter)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.slot is not None:
            self.slot.release()
            self.slot = None
