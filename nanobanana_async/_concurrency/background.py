"""Where background work lives: one task of its own, on asyncio or on trio.

So a client may be opened in one task and closed in another, as bots and fixtures do; a task group entered in
`__aenter__` breaks then.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from nanobanana_async._concurrency.events import trio_lowlevel
from nanobanana_async.errors import ConfigurationError

T = TypeVar("T")


_CLOSED_MESSAGE: Final = "the client is closed, or its event loop has ended; make a new one"


class ShieldedWorkCancelled(Exception):
    """The host was closed before sheltered work had ended."""


class _ShieldedResult(Generic[T]):
    """What one sheltered call came to, for a caller who may have gone."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.abandoned = False
        self.value: T | None = None
        self.error: Exception | None = ShieldedWorkCancelled()


class BackgroundTaskGroup:
    """Runs background tasks from first use to `aclose`, bound to the event loop of that first use.

    Everything raises `ConfigurationError` after `aclose`, on another event loop, and in a forked child.
    """

    def __init__(self) -> None:
        self._owner: tuple[int, object] | None = None
        self._tasks: TaskGroup | None = None
        self._ready = anyio.Event()
        self._stop = anyio.Event()
        self._done = anyio.Event()
        self._drained = anyio.Event()
        self._shielded = 0
        self._drain_s = 0.0
        self._closing = False
        self._root: asyncio.Task[None] | None = None
        self.on_stopped: Callable[[], None] = lambda: None
        """Called when background work has ended, also when the event loop ended it."""

    @property
    def is_open(self) -> bool:
        """Whether background work was started and not stopped."""
        return self._owner is not None and not self._closing

    def check_open(self) -> None:
        """Raise unless new work may begin."""
        if self._closing:
            raise ConfigurationError(_CLOSED_MESSAGE)

    async def ensure_started(self) -> None:
        """Start on first use; say so clearly when this is no place to be used from."""
        self.check_open()
        if self._owner is None:
            self._owner = self._current_owner()
            self._start()
        else:
            self.check_owner()
        await self._ready.wait()

    def start_soon(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Run *work* in the background, after `ensure`. It must not raise; closing cancels it."""
        if self._tasks is None:
            raise ConfigurationError(_CLOSED_MESSAGE)
        self._tasks.start_soon(work)

    async def shield(self, work: Callable[[], Awaitable[T]], *, on_abandoned: Callable[[T], None]) -> T:
        """Return what *work* returns, and let it run to its end even if the caller is cancelled meanwhile.

        Starts without giving way, so from the call on *work* is certain to run. When the caller has gone,
        the result goes to *orphaned* instead.

        Raises:
            ShieldedWorkCancelled: The host was closed, and *work* did not end in the time it was given.
        """
        result: _ShieldedResult[T] = _ShieldedResult()
        self._shielded += 1
        self.start_soon(lambda: self._run_shielded(work, result, on_abandoned))
        try:
            await result.done.wait()
        except BaseException:
            result.abandoned = True
            if result.done.is_set() and result.error is None:  # answered and cancelled in the same breath
                on_abandoned(result.value)  # type: ignore[arg-type]  # set whenever `error` is not
            raise
        if result.error is not None:
            raise result.error
        return result.value  # type: ignore[return-value]  # the same

    async def aclose(self, *, drain_s: float) -> None:
        """Take no new work, give sheltered calls *drain_s* seconds to end, cancel the rest. Twice is harmless.

        Cancelling ends the waiting; the background work ends all the same.
        """
        self.check_owner()
        self.request_stop(drain_s=drain_s)
        if self._owner is not None:
            await self._done.wait()

    def request_stop(self, *, drain_s: float) -> None:
        """Begin what `aclose` does, without waiting for its end. Only on its own event loop."""
        self._closing = True
        if not self._stop.is_set():
            self._drain_s = drain_s
            self._stop.set()

    @staticmethod
    def _current_owner() -> tuple[int, object]:
        return os.getpid(), anyio.lowlevel.current_token()

    def check_owner(self) -> None:
        """Raise unless this is the event loop and the process it was first used in, if it was."""
        if self._owner is None:
            return
        if self._owner[0] != os.getpid():
            raise ConfigurationError("the client was made before a fork; make one in each process")
        if self._owner != self._current_owner():
            raise ConfigurationError("the client belongs to another event loop; make one in each loop")

    def _start(self) -> None:
        lowlevel = trio_lowlevel()
        if lowlevel is not None and lowlevel.in_trio_run():
            lowlevel.spawn_system_task(self._run, name="nanobanana_async")
        else:
            self._root = asyncio.get_running_loop().create_task(self._run(), name="nanobanana_async")
            self._root.add_done_callback(
                lambda _: self._mark_stopped()
            )  # a task that is cancelled before its first step

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                self._ready.set()
                await self._stop.wait()
                if self._shielded:
                    with anyio.move_on_after(self._drain_s):
                        await self._drained.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._mark_stopped()

    def _mark_stopped(self) -> None:
        """Let everybody know that background work has ended, also when the event loop ended it, or never began it."""
        if not self._done.is_set():
            self._closing = True
            self._tasks = None
            self.on_stopped()
            self._ready.set()
            self._done.set()

    async def _run_shielded(
        self, work: Callable[[], Awaitable[T]], result: _ShieldedResult[T], on_abandoned: Callable[[T], None]
    ) -> None:
        try:
            result.value = await work()
            result.error = None
        except Exception as exc:  # noqa: BLE001 - it is the caller's, and re-raised there
            result.error = exc
        finally:
            self._shielded -= 1
            if self._closing and not self._shielded:
                self._drained.set()
            result.done.set()
        if result.abandoned and result.error is None:
            on_abandoned(result.value)  # type: ignore[arg-type]  # the same
