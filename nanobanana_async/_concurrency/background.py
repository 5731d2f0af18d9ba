"""Run background tasks under a dedicated root task, on asyncio or trio.

A task group must be exited in the task that entered it, but bots and pytest fixtures open and close clients in
different tasks.
"""

import asyncio
import contextlib
import contextvars
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Final, Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from nanobanana_async._concurrency.events import is_cancelled, trio_lowlevel
from nanobanana_async.errors import ClientClosed, WrongEventLoop

T = TypeVar("T")

_log: Final = logging.getLogger("nanobanana_async")

CLOSE_TIMEOUT_S: Final = 10.0
"""Longest time that closing the resources of a group takes."""
_CLOSED_MESSAGE: Final = "client: is closed, or its event loop has ended. Create a new client."


class ShieldedWorkCancelled(Exception):
    """The background task group was closed before shielded work had finished."""


class _ShieldedResult(Generic[T]):
    """The result of one shielded call, for a caller that may have been cancelled."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.abandoned = False
        self.value: T | None = None
        self.error: Exception | None = ShieldedWorkCancelled()


class BackgroundTaskGroup:
    """A task group that runs from first use to `aclose`, bound to the event loop of that first use.

    Every method raises `ClientClosed` after `aclose`, and `WrongEventLoop` on another event loop, in another thread and
    in a forked child.
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
        self._call_soon: Callable[[Callable[[], None]], object] = _call_now
        """Calls a function on the group's event loop, from any thread."""
        self._callbacks: list[Callable[[], None]] = []
        self._resources: list[Callable[[], Awaitable[None]]] = []

    @property
    def is_open(self) -> bool:
        """Whether background work was started and not stopped."""
        return self._owner is not None and not self._closing and not self._has_ended()

    def check_open(self) -> None:
        """Raise `ClientClosed` if the group is closed."""
        if self._closing:
            raise ClientClosed(_CLOSED_MESSAGE)

    def call_when_stopped(self, callback: Callable[[], None]) -> None:
        """Call *callback* when background work has ended, also if the event loop ended it."""
        self._callbacks.append(callback)

    def close_when_stopped(self, aclose: Callable[[], Awaitable[None]]) -> None:
        """Await *aclose* when background work has ended, at most `CLOSE_TIMEOUT_S` for all of them."""
        self._resources.append(aclose)

    async def ensure_started(self) -> None:
        """Start the group on first use. Raise `WrongEventLoop` in another event loop or process."""
        self.check_open()
        if self._owner is None:
            self._owner = self._current_owner()
            self._start()
        else:
            self.check_owner()
        await self._ready.wait()

    def start_soon(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        """Run *work* in the background, after `ensure_started`. It must not raise. Closing the group cancels it.

        It runs in an empty context, so that it keeps no context variable of the caller alive.
        """
        contextvars.Context().run(self._start_soon, work)

    def _start_soon(self, work: Callable[[], Coroutine[object, object, None]]) -> None:
        if self._tasks is None:
            raise ClientClosed(_CLOSED_MESSAGE)
        self._tasks.start_soon(work)

    async def shield(self, work: Callable[[], Awaitable[T]], *, on_abandoned: Callable[[T], None]) -> T:
        """Return the result of *work*, which runs to its end even if the caller is cancelled.

        *work* starts without a checkpoint, so it always runs once this is called, in a copy of the caller's context. If
        the caller is cancelled, the result is passed to *on_abandoned* instead.

        Raises:
            ShieldedWorkCancelled: The group was closed, and *work* did not end within the drain time.
        """
        result: _ShieldedResult[T] = _ShieldedResult()
        self._shielded += 1
        self._start_soon(lambda: self._run_shielded(work, result, on_abandoned))
        try:
            await result.done.wait()
        except BaseException:
            result.abandoned = True
            if result.done.is_set() and result.error is None:  # the result and the cancellation arrived together
                on_abandoned(result.value)  # type: ignore[arg-type]  # `value` is set if `error` is None
            raise
        if result.error is not None:
            raise result.error
        return result.value  # type: ignore[return-value]  # `value` is set if `error` is None

    @contextlib.contextmanager
    def keep_open(self) -> Generator[None]:
        """Count the block as shielded work: closing waits for its end, at most for the drain time."""
        self._shielded += 1
        try:
            yield
        finally:
            self._leave_shielded()

    def _leave_shielded(self) -> None:
        self._shielded -= 1
        if self._closing and not self._shielded:
            self._drained.set()

    async def aclose(self, *, drain_s: float) -> None:
        """Refuse new work, give shielded calls *drain_s* seconds to finish, and cancel the rest.

        A second call has no effect, nor has one after the event loop has ended. Cancelling ends the wait, not the
        clean-up.
        """
        if self._has_ended():
            self._closing = True
            return
        self.check_owner()
        self.request_stop(drain_s=drain_s)
        if self._owner is not None:
            await self._done.wait()

    def request_stop(self, *, drain_s: float) -> None:
        """Start closing without waiting for the end. Call it on the group's own event loop only."""
        self._closing = True
        if not self._stop.is_set():
            self._drain_s = drain_s
            self._stop.set()

    def abandon(self, *, drain_s: float) -> None:
        """Start closing, from any thread. For a finalizer: it never raises."""
        if self._owner is not None and self._owner[0] == os.getpid():
            try:
                self._call_soon(lambda: self.request_stop(drain_s=drain_s))
            except RuntimeError:  # the event loop has ended
                _running.discard(self)

    def check_owner(self) -> None:
        """Raise `WrongEventLoop` in another event loop, thread or process than the one of first use."""
        if self._owner is None:
            return
        if self._owner[0] != os.getpid():
            raise WrongEventLoop("client: was created before a fork. Create one client per process.")
        try:
            is_owner = self._owner == self._current_owner()
        except RuntimeError:
            raise WrongEventLoop(
                "client: called from a thread without its event loop. Call it there, for example with "
                "loop.call_soon_threadsafe or anyio.from_thread.run_sync."
            ) from None
        if not is_owner:
            raise WrongEventLoop("client: is bound to another event loop. Create one client per event loop.")

    @staticmethod
    def _current_owner() -> tuple[int, object]:
        return os.getpid(), anyio.lowlevel.current_token()

    def _has_ended(self) -> bool:
        """Return whether the work has stopped, or the event loop was closed without stopping it."""
        return self._done.is_set() or (self._root is not None and self._root.get_loop().is_closed())

    def _start(self) -> None:
        _running.add(self)
        lowlevel = trio_lowlevel()
        if lowlevel is not None and lowlevel.in_trio_run():
            self._call_soon = lowlevel.current_trio_token().run_sync_soon
            lowlevel.spawn_system_task(self._run, name="nanobanana_async")
        else:
            loop = asyncio.get_running_loop()
            self._call_soon = loop.call_soon_threadsafe
            self._root = loop.create_task(self._run(), name="nanobanana_async", context=contextvars.Context())
            self._root.add_done_callback(
                lambda _: self._mark_stopped()
            )  # also if the task is cancelled before its first step

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
            self._tasks = None
            if not isinstance(sys.exception(), GeneratorExit):  # the event loop has ended: nothing can be awaited
                await self._close_resources()
            self._mark_stopped()

    async def _close_resources(self) -> None:
        with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            for aclose in reversed(self._resources):
                try:
                    await aclose()
                except Exception:  # noqa: BLE001 - the others are closed all the same
                    _log.exception("closing failed")

    def _mark_stopped(self) -> None:
        """Set the state to stopped and tell the owner, also if the event loop ended the work or never began it."""
        if not self._done.is_set():
            self._closing = True
            self._tasks = None
            _running.discard(self)
            for callback in self._callbacks:
                callback()
            self._ready.set()
            self._done.set()

    async def _run_shielded(
        self, work: Callable[[], Awaitable[T]], result: _ShieldedResult[T], on_abandoned: Callable[[T], None]
    ) -> None:
        try:
            result.value = await work()
            result.error = None
        except (anyio.get_cancelled_exc_class(), GeneratorExit) as exc:
            if is_cancelled():
                raise
            result.error = RuntimeError(f"cancelled internally: {exc!r}")  # by a future that other code has cancelled
        except Exception as exc:  # noqa: BLE001 - raised again in the caller's task
            result.error = exc
        finally:
            self._leave_shielded()
            result.done.set()
        if result.abandoned and result.error is None:
            on_abandoned(result.value)  # type: ignore[arg-type]  # `value` is set if `error` is None


def _call_now(function: Callable[[], None]) -> None:
    function()


_running: Final[set[BackgroundTaskGroup]] = set()
"""Groups that run. Event loops keep weak references to tasks only, so a dropped owner would take its group along."""
