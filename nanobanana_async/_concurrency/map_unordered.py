"""`map_unordered`: run many items through one worker function with bounded concurrency, in completion order."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from typing import Generic, TypeVar, cast

import anyio
from anyio.abc import TaskGroup

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.events import is_cancelled
from nanobanana_async.errors import ClientClosed

R = TypeVar("R")
O = TypeVar("O")  # noqa: E741 - the output type


async def iter_any(items: Iterable[R] | AsyncIterable[R]) -> AsyncGenerator[R]:
    """Yield each of *items*, from any kind of iterable. An async generator is closed with this one."""
    if isinstance(items, AsyncGenerator):
        async with contextlib.aclosing(cast("AsyncGenerator[R]", items)):
            async for item in items:
                yield item
    elif isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def map_unordered(
    background: BackgroundTaskGroup,
    items: AsyncGenerator[R],
    work: Callable[[R], Awaitable[O | None]],
    *,
    max_in_flight: int,
    on_unconsumed: Callable[[O], None],
) -> AsyncGenerator[O]:
    """Yield the result of *work* for each of *items* as it completes, except None. *background* must be started.

    An item is pulled when a slot is free, and holds the slot until its result has been consumed. An error of *items*
    stops the pulling and is raised here after the last result. An error of *work* ends everything. Closing the
    generator cancels running work without waiting for it. Results that were not consumed are passed to *on_unconsumed*.
    """
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight: expected at least 1, got {max_in_flight}")
    feed = _MapState(items, work, on_unconsumed, max_in_flight)
    background.start_soon(feed.run)
    try:
        async for outcome in feed.results:
            yield outcome
            feed.slots.release()
    finally:
        feed.stop()
    if feed.error is not None:
        raise feed.error


class _MapState(Generic[R, O]):
    """The background side of `map_unordered`."""

    def __init__(
        self,
        items: AsyncGenerator[R],
        work: Callable[[R], Awaitable[O | None]],
        on_unconsumed: Callable[[O], None],
        at_once: int,
    ) -> None:
        self._items = items
        self._work = work
        self._on_unconsumed = on_unconsumed
        self.slots = anyio.Semaphore(at_once)
        self._scope = anyio.CancelScope()
        self._results_send, self.results = anyio.create_memory_object_stream[O](at_once)
        self.error: Exception | None = ClientClosed("client: was closed before the last item had finished")

    async def run(self) -> None:
        """Run every item."""
        error = None
        with self._results_send, self._scope:
            try:
                async with anyio.create_task_group() as group:
                    try:
                        await self._pull(group)
                    except Exception as exc:  # noqa: BLE001 - raised to the consumer after the last result
                        error = exc
            except ExceptionGroup as exc:
                error = exc.exceptions[0]
            self.error = error

    async def _pull(self, group: TaskGroup) -> None:
        async with contextlib.aclosing(self._items):
            await self.slots.acquire()
            async for item in self._items:
                group.start_soon(self._run_one, item)
                await self.slots.acquire()

    async def _run_one(self, item: R) -> None:
        try:
            outcome = await self._work(item)
        except anyio.get_cancelled_exc_class() as exc:
            if is_cancelled():
                raise
            raise RuntimeError(f"cancelled internally: {exc!r}") from None  # by a future that other code has cancelled
        if outcome is None:
            self.slots.release()
            return
        try:
            self._results_send.send_nowait(outcome)
        except anyio.BrokenResourceError:
            self._on_unconsumed(outcome)

    def stop(self) -> None:
        """Cancel running work and pass results that were not consumed to the hook."""
        self._scope.cancel()
        with self.results, contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                self._on_unconsumed(self.results.receive_nowait())
