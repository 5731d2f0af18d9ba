"""`flow`: many rows through one worker function, a bounded number at a time, in the order in which they end."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import anyio
from anyio.abc import TaskGroup

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async.errors import ConfigurationError

R = TypeVar("R")
O = TypeVar("O")  # noqa: E741 - what comes out


async def each(rows: Iterable[R] | AsyncIterable[R]) -> AsyncGenerator[R]:
    """Yield each of *rows*, whichever kind they are. An async generator is closed with this one."""
    if isinstance(rows, AsyncGenerator):
        async with contextlib.aclosing(rows):
            async for row in rows:
                yield row
    elif isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row


async def flow(
    host: BackgroundTaskGroup,
    rows: AsyncGenerator[R],
    work: Callable[[R], Awaitable[O | None]],
    *,
    at_once: int,
    unread: Callable[[O], None],
) -> AsyncGenerator[O]:
    """Yield what *work* returns for each of *rows*, Nones aside, as each ends. *host* must be running.

    A row is taken when there is a place for it, and keeps the place until its outcome has been consumed. An error of
    *rows* ends the taking and is raised here, after the last outcome; one of *work* ends everything. Closing the
    generator cancels what is under way, without waiting for it: that is the host's business. Outcomes that nobody
    took by then go to *unread*.
    """
    if at_once < 1:
        raise ValueError(f"max_in_flight: must be at least 1, got {at_once}")
    feed = _MapState(rows, work, unread, at_once)
    host.start_soon(feed.run)
    try:
        async for outcome in feed.inlet:
            yield outcome
            feed.places.release()
    finally:
        feed.end()
    if feed.error is not None:
        raise feed.error


class _MapState(Generic[R, O]):
    """The side of a flow that runs in the background."""

    def __init__(
        self,
        rows: AsyncGenerator[R],
        work: Callable[[R], Awaitable[O | None]],
        unread: Callable[[O], None],
        at_once: int,
    ) -> None:
        self._rows = rows
        self._work = work
        self._unread = unread
        self.places = anyio.Semaphore(at_once)
        self._scope = anyio.CancelScope()
        self._outlet, self.inlet = anyio.create_memory_object_stream[O](at_once)
        self.error: Exception | None = ConfigurationError("the client was closed before the last row had ended")

    async def run(self) -> None:
        """Run every row."""
        error = None
        with self._outlet, self._scope:
            try:
                async with anyio.create_task_group() as group:
                    try:
                        await self._take(group)
                    except Exception as exc:  # noqa: BLE001 - raised to whoever consumes, when the others have ended
                        error = exc
            except ExceptionGroup as exc:
                error = exc.exceptions[0]
            self.error = error

    async def _take(self, group: TaskGroup) -> None:
        async with contextlib.aclosing(self._rows):
            await self.places.acquire()
            async for row in self._rows:
                group.start_soon(self._one, row)
                await self.places.acquire()

    async def _one(self, row: R) -> None:
        outcome = await self._work(row)
        if outcome is None:
            self.places.release()
            return
        try:
            self._outlet.send_nowait(outcome)
        except anyio.BrokenResourceError:
            self._unread(outcome)

    def end(self) -> None:
        """Stop: nobody reads any more."""
        self._scope.cancel()
        with self.inlet, contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                self._unread(self.inlet.receive_nowait())
