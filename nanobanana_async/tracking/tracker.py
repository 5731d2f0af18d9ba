"""`TaskTracker`: one coroutine that polls for any number of tasks, within a bounded set of requests.

Cost follows what is due, not what is watched: a watched task is an entry in a dict and one in a heap, not a coroutine
and not a timer. All who wait for one id share its entry and its polls; when the last one leaves, the entry goes.
"""

import copy
import heapq
import itertools
import logging
import math
from collections.abc import AsyncGenerator
from functools import partial
from typing import Final, Protocol

import anyio
import attrs

from nanobanana_async._host import Host
from nanobanana_async.errors import (
    AuthenticationError,
    InvalidRequest,
    NanoBananaError,
    TaskNotFound,
    TaskUnfinished,
    TransportError,
)
from nanobanana_async.models import Task, TaskStatus
from nanobanana_async.tracking.schedule import NOT_FOUND_GRACE_S, Schedule, has_vanished, newer

_log: Final = logging.getLogger("nanobanana_async")

_WARN_AFTER: Final = 3


class Source(Protocol):
    """Where the tracker asks."""

    async def take_turn(self) -> None:
        """Return when one more query may leave: a slot is taken, and the pacer has agreed."""
        ...

    def drop_turn(self) -> None:
        """Give the slot back unused."""
        ...

    async def look(self, task_id: str) -> Task:
        """Query once; gives the slot back."""
        ...


@attrs.frozen(kw_only=True)
class Origin:
    """What is known of a task before it is first looked at."""

    submitted_at_s: float | None = None
    """When this client's submit was accepted, on the event loop's clock; None when it was submitted elsewhere."""
    model: str | None = None


@attrs.define(eq=False)
class _Entry:
    """One watched task."""

    task_id: str
    origin: Origin
    born_s: float
    """When it was submitted; minus infinity when nobody here knows, for it may have ended long ago."""
    waiters: int = 0
    looks: int = 0
    due_s: float = math.inf
    """When it is next looked at; infinity while a look is under way. A heap item with another time is stale."""
    task: Task | None = None
    """The last snapshot, never older in status than the one before."""
    error: NanoBananaError | None = None
    """What ended the watching, for all who wait."""
    trouble: NanoBananaError | None = None
    """What the last look met instead of an answer."""
    there_s: float = -math.inf
    """When it was last seen at the service, on the event loop's clock."""
    late_since_s: float | None = None
    """Since when it has answered 404 although it should be there; None while it has not."""
    late_looks: int = 0
    changed: anyio.Event = attrs.field(factory=anyio.Event)


class TaskTracker:
    """Watches task ids for as long as somebody waits for them.

    Starts its coroutine with the first wait. One bad task, and one bad answer, never stops another task.
    """

    def __init__(self, source: Source, schedule: Schedule, host: Host) -> None:
        self._source = source
        self._schedule = schedule
        self._host = host
        self._watched: dict[str, _Entry] = {}
        self._due: list[tuple[float, int, _Entry]] = []
        self._ticket = itertools.count()
        self._wake = anyio.Event()
        self._running = False
        self._failures = 0

    async def wait(self, task_id: str, *, timeout_s: float, origin: Origin = Origin()) -> Task:
        """Return the task once its status is final, whether it succeeded or failed.

        Shares polls with all who wait for the same id. Cancelling stops the waiting, not the task.

        Raises:
            TaskUnfinished: *timeout_s* passed, or the client was closed; `exc.task` is the last snapshot.
            TaskNotFound: The service does not know the id.
            AuthenticationError: The service does not accept the key; this ends every wait.
            InvalidRequest: The service does not accept the id.
        """
        await self._host.ensure()
        deadline_s = anyio.current_time() + timeout_s
        entry = self._join(task_id, origin)
        try:
            while entry.task is None or not entry.task.is_final:
                await self._change(entry, deadline_s, timeout_s)
            return entry.task
        finally:
            self._leave(entry)

    async def updates(self, task_id: str, *, timeout_s: float, origin: Origin = Origin()) -> AsyncGenerator[Task]:
        """Yield a snapshot at each change of status, the final one last. Raises as `wait` does."""
        await self._host.ensure()
        deadline_s = anyio.current_time() + timeout_s
        entry = self._join(task_id, origin)
        shown: TaskStatus | None = None
        try:
            while shown is None or not shown.is_final:
                if entry.task is None or entry.task.status is shown:
                    await self._change(entry, deadline_s, timeout_s)
                else:
                    shown = entry.task.status
                    yield entry.task
        finally:
            self._leave(entry)

    def close(self) -> None:
        """End every wait; the tasks themselves run on at the service."""
        for entry in list(self._watched.values()):
            reason = "the client was closed while waiting; the task runs on and can be awaited again"
            self._end(entry, TaskUnfinished(reason, task=entry.task, task_id=entry.task_id))

    # --- who waits --------------------------------------------------------------------------------------------------

    def _join(self, task_id: str, origin: Origin) -> _Entry:
        entry = self._watched.get(task_id)
        if entry is None:
            born_s = -math.inf if origin.submitted_at_s is None else origin.submitted_at_s
            entry = self._watched[task_id] = _Entry(task_id, origin, born_s)
            self._plan(entry)
            if not self._running:
                self._running = True
                self._host.start_soon(self._run)
        entry.waiters += 1
        return entry

    def _leave(self, entry: _Entry) -> None:
        entry.waiters -= 1
        if not entry.waiters and self._watched.get(entry.task_id) is entry:
            del self._watched[entry.task_id]
            entry.due_s = math.inf

    async def _change(self, entry: _Entry, deadline_s: float, timeout_s: float) -> None:
        """Return when there is news of *entry*; raise what ended the watching, or that the time is up."""
        if entry.error is None:
            with anyio.CancelScope(deadline=deadline_s):
                await entry.changed.wait()
                return
        if entry.error is not None:
            raise copy.copy(entry.error)  # each waiter its own: a shared one would collect everybody's traceback
        last = "nothing was heard of it" if entry.task is None else f"it was {entry.task.status}"
        trouble = "" if entry.trouble is None else f" (the last look met: {entry.trouble})"
        raise TaskUnfinished(
            f"task {entry.task_id} was not final within {timeout_s:.6g} s: {last}{trouble}. It runs on; wait again",
            task=entry.task,
            task_id=entry.task_id,
        )

    def _announce(self, entry: _Entry) -> None:
        entry.changed.set()
        entry.changed = anyio.Event()

    def _end(self, entry: _Entry, error: NanoBananaError | None = None) -> None:
        """Stop watching: the task is final, or *error* is what every waiter gets."""
        entry.error = error
        entry.due_s = math.inf
        if self._watched.get(entry.task_id) is entry:
            del self._watched[entry.task_id]
        self._announce(entry)

    # --- the scheduler ----------------------------------------------------------------------------------------------

    def _plan(self, entry: _Entry) -> None:
        if self._watched.get(entry.task_id) is not entry:
            return  # everybody who waited has gone while a look was under way
        now_s = anyio.current_time()
        pause_s = self._schedule.pause_s(entry.origin.model, now_s - entry.born_s, entry.looks)
        entry.due_s = now_s + pause_s
        if not self._due or entry.due_s < self._due[0][0]:
            self._wake.set()
        heapq.heappush(self._due, (entry.due_s, next(self._ticket), entry))
        if len(self._due) > 2 * len(self._watched) + 100:  # mostly of those who left early: amortised, this is free
            self._due = [item for item in self._due if item[0] == item[2].due_s]
            heapq.heapify(self._due)

    async def _run(self) -> None:
        try:
            await self._serve()
        except Exception as exc:  # noqa: BLE001 - a bug; nobody may be left waiting for a scheduler that is gone
            _log.exception("the tracker failed")
            self._running = False
            for entry in list(self._watched.values()):
                self._end(entry, TransportError(f"the tracker failed: {exc!r}", task_id=entry.task_id))

    async def _serve(self) -> None:
        """Look at whatever is due, the longest overdue first, for as long as the client lives."""
        while True:
            if (wait_s := self._until_due_s()) > 0:
                self._wake = anyio.Event()
                with anyio.move_on_after(wait_s):
                    await self._wake.wait()
                continue
            # The turn comes before the task: what is due queues in the heap, and not as coroutines.
            await self._source.take_turn()
            if self._until_due_s() > 0:
                self._source.drop_turn()  # whoever was due has gone while we queued
                continue
            entry = heapq.heappop(self._due)[2]
            entry.due_s = math.inf
            self._host.start_soon(partial(self._look, entry))

    def _until_due_s(self) -> float:
        """Return the seconds to the next look, infinity when nothing is planned, and drop stale items on the way."""
        while self._due and self._due[0][0] != self._due[0][2].due_s:
            heapq.heappop(self._due)
        return self._due[0][0] - anyio.current_time() if self._due else math.inf

    async def _look(self, entry: _Entry) -> None:
        entry.looks += 1
        try:
            task = await self._source.look(entry.task_id)
        except AuthenticationError as exc:
            for other in list(self._watched.values()):
                self._end(other, _about(exc, other.task_id))
        except TaskNotFound as exc:
            self._missed(entry, exc)
        except NanoBananaError as exc:
            # A late answer, not a failed task, unless the vendor himself says that the question is wrong.
            if isinstance(exc, InvalidRequest) and exc.status in (400, 422) and exc.code is not None:
                self._end(entry, exc)
            else:
                self._note_trouble(exc)
                entry.trouble = exc
                self._plan(entry)
        except Exception as exc:  # noqa: BLE001 - a handed-in transport may raise anything, and must not stop the others
            _log.exception("task %s: the look failed in a way it must not", entry.task_id)
            self._end(
                entry, TransportError(f"the transport failed: {type(exc).__name__}: {exc}", task_id=entry.task_id)
            )
        else:
            self._saw(entry, task)

    def _note_trouble(self, exc: NanoBananaError) -> None:
        """Say once, for all tasks together, that answers stay away: silence would look like a slow picture."""
        self._failures += 1
        if self._failures == _WARN_AFTER:
            _log.warning("%d looks in a row brought no answer; looking on: %s", self._failures, exc)

    def _saw(self, entry: _Entry, task: Task) -> None:
        self._failures = 0
        entry.there_s, entry.late_since_s, entry.late_looks, entry.trouble = anyio.current_time(), None, 0, None
        known = entry.task
        if known is None or newer(known.status, task.status) is task.status:
            entry.task = task
        if task.is_final:
            self._end(entry)
            return
        self._plan(entry)
        if known is None or entry.task is not known:
            self._announce(entry)

    def _missed(self, entry: _Entry, exc: TaskNotFound) -> None:
        """Judge a 404: fresh ids are invisible for a while, foreign ones never seen do not exist."""
        now_s = anyio.current_time()
        if entry.origin.submitted_at_s is None and entry.task is None:
            self._end(entry, exc)
            return
        if now_s - max(entry.born_s, entry.there_s) > NOT_FOUND_GRACE_S:
            entry.late_since_s = now_s if entry.late_since_s is None else entry.late_since_s
            entry.late_looks += 1
            if has_vanished(entry.late_looks, now_s - entry.late_since_s):
                self._end(entry, exc)
                return
        entry.trouble = exc
        self._plan(entry)


def _about(exc: NanoBananaError, task_id: str) -> NanoBananaError:
    mine = copy.copy(exc)
    mine.args = (str(exc).replace(exc.task_id or task_id, task_id),)
    mine.task_id = task_id
    return mine
