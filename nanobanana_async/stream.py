"""`stream`: the events of one request, from its place in line to its final task."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Final

import anyio

from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.calls import SubmitCall
from nanobanana_async.emission import to_event
from nanobanana_async.errors import ClientClosed
from nanobanana_async.events import Finished, Queued, StatusChanged, Submitted
from nanobanana_async.handle import TaskHandle
from nanobanana_async.session import Session
from nanobanana_async.tracking.state import SubmitInfo

_POSITION_INTERVAL_S: Final = 1.0
"""How often the place in line is computed. It changes with each submit of any owner, which is too often to read."""


class _BackgroundSubmit:
    """A submit that runs while its caller watches the place in line."""

    def __init__(self, session: Session, call: SubmitCall) -> None:
        self._session = session
        self._call = call
        self._scope = anyio.CancelScope()
        self.handle: TaskHandle | None = None
        self.error: Exception | None = None
        self.is_done = False
        self._has_left = False
        self._done = OneShotEvent()

    async def run(self) -> None:
        """Submit. The result is in `handle` or `error`."""
        try:
            with self._scope:
                self.handle = await self._session.submit(self._call)
        except Exception as exc:  # noqa: BLE001 - raised again by the stream
            self.error = exc
        finally:
            if self.handle is None and self.error is None:
                self.error = ClientClosed("client: was closed while the request waited. Nothing is known to be sent.")
            self.is_done = True
            if self._has_left:
                self.leave()
            self._done.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until the submit has ended, for at most *timeout_s*. Return whether it has."""
        with anyio.move_on_after(timeout_s):
            await self._done.wait()
        return self.is_done

    def leave(self) -> None:
        """Give up the place in line. A POST in flight runs to its end, and its task becomes an orphan."""
        self._has_left = True
        if not self.is_done:
            self._scope.cancel()
        elif self.handle is not None:
            self._session.report_orphan(self.handle)


async def stream(
    session: Session, call: SubmitCall, *, every_s: float
) -> AsyncGenerator[Queued | Submitted | StatusChanged | Finished]:
    """Yield the events of *call*. See `NanoBananaClient.stream`."""
    await session.start()
    submit = _BackgroundSubmit(session, call)
    position = session.queue.position(call.waiter)
    session.background.start_soon(submit.run)
    shown_s, is_known = anyio.current_time(), False
    try:
        yield session.queued(call)
        while not await submit.wait(min(every_s, _POSITION_INTERVAL_S)):
            now, now_s = session.queue.position(call.waiter), anyio.current_time()
            if not call.waiter.acquired and (now != position or now_s - shown_s >= every_s):
                position, shown_s = now, now_s
                yield session.queued(call)
        if submit.error is not None:
            raise submit.error
        handle = submit.handle
        assert handle is not None  # noqa: S101 - it has no error
        is_known = True
    finally:
        if not is_known:
            submit.leave()
    info = SubmitInfo(key=call.key, owner=call.owner)
    duplicates = handle.possible_duplicates
    yield Submitted(key=call.key, owner=call.owner, task_id=handle.task_id, possible_duplicates=duplicates)
    left_s = max(0.0, call.deadline_s - anyio.current_time())
    updates = session.tracker.updates(handle.task_id, timeout_s=left_s, every_s=every_s)
    async with contextlib.aclosing(updates):
        async for task in updates:
            yield to_event(info, task, handle.eta())
