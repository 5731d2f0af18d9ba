"""Run background tasks under a dedicated root task, on asyncio or trio.

A task group must be exited in the task that entered it, but bots and pytest fixtures open and close clients in
different tasks.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from nanobanana_async._concurrency.events import is_cancelled, trio_lowlevel
from nanobanana_async.errors import ClientClosed, WrongEventLoop

T = TypeVar("T")


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

    Every method raises `ClientClosed` after `aclose`, and `WrongEventLoop` on another event loop and in a forked child.
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
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_open(self) -> bool:
        """Whether background work was started and not stopped."""
        return self._owner is not None and not self._closing

    def check_open(self) -> None:
        """Raise `ClientClosed` if the group is closed."""
        if self._closing:
            raise ClientClosed(_CLOSED_MESSAGE)

    def call_when_stopped(self, callback: Callable[[], None]) -> None:
        """Call *callback* when background work has ended, also if the event loop ended it."""
        self._callbacks.append(callback)

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
        """Run *work* in the background, after `ensure_started`. It must not raise. Closing the group cancels it."""
        if self._tasks is None:
            raise ClientClosed(_CLOSED_MESSAGE)
        self._tasks.start_soon(work)

    async def shield(self, work: Callable[[], Awaitable[T]], *, on_abandoned: Callable[[T], None]) -> T:
        """Return the result of *work*, which runs to its end even if the caller is cancelled.

        *work* starts without a checkpoint, so it always runs once this is called. If the caller is cancelled, the
        result is passed to *on_abandoned* instead.

        Raises:
            ShieldedWorkCancelled: The group was closed, and *work* did not end within the drain time.
        """
        result: _ShieldedResult[T] = _ShieldedResult()
        self._shielded += 1
        self.start_soon(lambda: self._run_shielded(work, result, on_abandoned))
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

    async def aclose(self, *, drain_s: float) -> None:
        """Refuse new work, give shielded calls *drain_s* seconds to finish, and cancel the rest.

        A second call has no effect. Cancelling ends the wait, not the clean-up.
        """
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

    @staticmethod
    def _current_owner() -> tuple[int, object]:
        return os.getpid(), anyio.lowlevel.current_token()

    def check_owner(self) -> None:
        """Raise `WrongEventLoop` in another event loop or process than the one of first use."""
        if self._owner is None:
            return
        if self._owner[0] != os.getpid():
            raise WrongEventLoop("client: was created before a fork. Create one client per process.")
        if self._owner != self._current_owner():
            raise WrongEventLoop("client: is bound to another event loop. Create one client per event loop.")

    def _start(self) -> None:
        lowlevel = trio_lowlevel()
        if lowlevel is not None and lowlevel.in_trio_run():
            lowlevel.spawn_system_task(self._run, name="nanobanana_async")
        else:
            self._root = asyncio.get_running_loop().create_task(self._run(), name="nanobanana_async")
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
            self._mark_stopped()

    def _mark_stopped(self) -> None:
        """Set the state to stopped and tell the owner, also if the event loop ended the work or never began it."""
        if not self._done.is_set():
            self._closing = True
            self._tasks = None
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
            self._shielded -= 1
            if self._closing and not self._shielded:
                self._drained.set()
            result.done.set()
        if result.abandoned and result.error is None:
            on_abandoned(result.value)  # type: ignore[arg-type]  # `value` is set if `error` is None
