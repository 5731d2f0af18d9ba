"""`TaskTracker`: one coroutine that polls for any number of tasks, within a bounded set of requests.

Cost follows what is due, not what is watched: a watched task is an entry in a dict and one in a heap, not a coroutine
and not a timer. All who wait for one id share its entry and its polls; when the last one leaves, the entry goes.
"""

import copy
import logging
import math
from collections.abc import AsyncGenerator
from functools import partial
from typing import Final, Protocol

import anyio

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.delay_queue import DelayQueue
from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.errors import (
    AuthenticationError,
    InvalidRequest,
    NanoBananaError,
    TaskNotFound,
    TaskTimeout,
    TransportError,
)
from nanobanana_async.models import Task, TaskStatus
from nanobanana_async.tracking.schedule import FOREIGN_AGE_S, NOT_FOUND_GRACE_S, PollSchedule, has_vanished, newer
from nanobanana_async.tracking.state import (
    NOBODYS,
    SubmitInfo,
    TaskCache,
    TrackedTask,
    TrackerStatistics,
    Waiter,
    about,
    vanished,
)

_log: Final = logging.getLogger("nanobanana_async")

_GRAIN_S: Final = 0.2
_WARN_AFTER: Final = 3
_NET: Final = 4
"""Times `PollPolicy.max_s` between looks at a task whose end will be announced."""
_DEAF_AFTER: Final = 3
"""So many ends that were not announced, and announcements are no longer relied on until the next one comes."""
_ORIGINS: Final = 4096
"""Own submits that are remembered, for handles that are made again from an id: a web app's second request."""


class PollSource(Protocol):
    """Where the tracker asks."""

    @property
    def polls_per_s(self) -> float:
        """How many queries may leave per second, as things stand."""
        ...

    async def take_turn(self) -> None:
        """Return when one more query may leave: a slot is taken, and the pacer has agreed."""
        ...

    def drop_turn(self) -> None:
        """Give the slot back unused."""
        ...

    async def look(self, task_id: str) -> Task:
        """Query once; gives the slot back."""
        ...


class TaskTracker:
    """Watches task ids for as long as somebody waits for them.

    Starts its coroutine with the first wait. One bad task, and one bad answer, never stops another task.
    """

    def __init__(self, source: PollSource, schedule: PollSchedule, host: BackgroundTaskGroup) -> None:
        self._source = source
        self._schedule = schedule
        self._host = host
        self._watched: dict[str, TrackedTask] = {}
        self.memory: Final = TaskCache()
        grain_s = min(_GRAIN_S, schedule.policy.min_s / 2)
        self._looks: DelayQueue[TrackedTask] = DelayQueue(grain_s)
        self._deadlines: DelayQueue[Waiter] = DelayQueue(grain_s)
        self._wanted_per_s = 0.0
        self._running = False
        self._failures = 0
        self._in_flight = 0
        self._polls = 0
        self._warned_of_status = False
        self._unannounced = 0
        """Tasks in a row whose end should have been announced, and was found by a look."""

    async def wait(self, task_id: str, *, timeout_s: float, origin: SubmitInfo = SubmitInfo()) -> Task:
        """Return the task once its status is final, whether it succeeded or failed.

        Shares polls with all who wait for the same id. Cancelling stops the waiting, not the task.

        Raises:
            TaskTimeout: *timeout_s* passed, or the client was closed; `exc.task` is the last snapshot.
            TaskNotFound: The service does not know the id.
            AuthenticationError: The service does not accept the key; this ends every wait.
            InvalidRequest: The service does not accept the id.
        """
        await self._host.ensure()
        if (final := self.memory.finals.get(task_id)) is not None:
            return final
        deadline_s = anyio.current_time() + timeout_s
        watch = self.watch(task_id, origin)
        try:
            while watch.entry.task is None or not watch.entry.task.is_final:
                await self._bell(watch, deadline_s, timeout_s).wait()
            return watch.entry.task
        finally:
            self.leave(watch)

    async def updates(
        self, task_id: str, *, timeout_s: float, origin: SubmitInfo = SubmitInfo()
    ) -> AsyncGenerator[Task]:
        """Yield a snapshot at each change of status, the final one last. Raises as `wait` does."""
        await self._host.ensure()
        if (final := self.memory.finals.get(task_id)) is not None:
            yield final
            return
        deadline_s = anyio.current_time() + timeout_s
        watch = self.watch(task_id, origin)
        entry, shown = watch.entry, None
        try:
            while shown is None or not shown.is_final:
                if entry.task is None or entry.task.status is shown:
                    await self._bell(watch, deadline_s, timeout_s).wait()
                else:
                    shown = entry.task.status
                    yield entry.task
        finally:
            self.leave(watch)

    def watch(self, task_id: str, origin: SubmitInfo = SubmitInfo()) -> Waiter:
        """Have *task_id* looked at until it is final, or until `leave`. The host must be running."""
        origin = origin if origin.submitted_at_s is not None else self.memory.origins.get(task_id) or origin
        entry = self._watched.get(task_id)
        if entry is None:
            entry = self._watched[task_id] = self.memory.left.pop(task_id) or self._new(task_id, origin)
            if not entry.looks:
                self._plan(entry)
            elif not entry.is_asked:
                self._looks.plan(entry, entry.later_s)
            if not self._running:
                self._running = True
                self._host.start_soon(self._run)
        entry.adopt(origin)
        watch = Waiter(entry)
        entry.join(watch)
        return watch

    def _new(self, task_id: str, origin: SubmitInfo) -> TrackedTask:
        entry = TrackedTask(task_id, None, anyio.current_time() - FOREIGN_AGE_S, is_ours=False)
        entry.adopt(origin)
        if self.memory.heard.pop(task_id):
            entry.plan_confirmation(anyio.current_time())
        return entry

    def leave(self, watch: Waiter) -> None:
        """End *watch*; the last to leave ends the looking."""
        self._deadlines.remove(watch)
        entry, watch.entry = watch.entry, NOBODYS  # the agenda may hold on to it for a while
        entry.part(watch)
        if entry.first is None and self._watched.get(entry.task_id) is entry:
            entry.later_s = entry.due_s
            self._drop(entry)
            self.memory.left.keep(entry.task_id, entry)

    def notify(self, task_id: str) -> None:
        """Take the hint that there is news of *task_id*: it is looked at, at once if that did not just happen.

        Anybody may send a hint, so it buys at most one look per task in ten seconds, and none at ids nobody waits for.
        """
        entry = self._watched.get(task_id) or self.memory.left.get(task_id)
        if entry is None and self.memory.origins.get(task_id) is not None:
            self.memory.heard.keep(task_id, thing=True)
        if entry is None or not entry.plan_confirmation(anyio.current_time()):
            return
        self._unannounced = 0
        entry.later_s = entry.confirm_s
        if entry.confirm_s < entry.due_s < math.inf:  # with a look under way, `_plan` will see to it
            self._looks.plan(entry, entry.confirm_s)

    def statistics(self) -> TrackerStatistics:
        """Return how things stand. O(watched)."""
        try:
            now_s = anyio.current_time()
        except RuntimeError:  # no event loop (any more): nothing is late
            now_s = -math.inf
        return TrackerStatistics(
            watched=len(self._watched),
            in_flight=self._in_flight,
            overdue=self._looks.late(now_s),
            overdue_s=max(0.0, now_s - self._looks.next_s()),
            pressure=self._pressure(),
            polls=self._polls,
            wakes=self._looks.wakes,
            median_s=self._schedule.medians_s(),
            curves=self._schedule.curves(),
        )

    def close(self) -> None:
        """End every wait; the tasks themselves run on at the service."""
        for entry in list(self._watched.values()):
            reason = (
                f"the client was closed while waiting for task {entry.task_id}; it runs on and can be awaited again"
            )
            self._end(entry, TaskTimeout(reason, task=entry.task, task_id=entry.task_id))

    # --- who waits --------------------------------------------------------------------------------------------------

    def _bell(self, watch: Waiter, deadline_s: float, timeout_s: float) -> OneShotEvent:
        """Return what rings when there may be news; raise what ended the watching, or that the time is up."""
        entry = watch.entry
        if entry.error is not None:
            raise copy.copy(entry.error)  # each waiter its own: a shared one would collect everybody's traceback
        if anyio.current_time() < deadline_s:
            if watch.due_s != deadline_s:
                self._deadlines.plan(watch, deadline_s)
            watch.bell = OneShotEvent()
            return watch.bell
        unheard = "its callback has not come" if entry.is_announced else "nothing was heard of it"
        last = unheard if entry.task is None else f"it was {entry.task.status}"
        trouble = entry.trouble and f" (the last look met: {entry.trouble})"
        raise TaskTimeout(
            f"task {entry.task_id} was not final within {timeout_s:.3g} s: {last}{trouble}. It runs on; wait again",
            task=entry.task,
            task_id=entry.task_id,
        )

    async def _end_patience(self) -> None:
        """Wake each waiter whose time is up: one timer for all of them."""
        while True:
            await self._deadlines.until_due()
            self._deadlines.pop().ring()

    def _drop(self, entry: TrackedTask) -> None:
        self._looks.remove(entry)
        self._wanted_per_s -= entry.wanted_per_s
        entry.wanted_per_s = 0.0
        if self._watched.get(entry.task_id) is entry:
            del self._watched[entry.task_id]
        if not self._watched:
            self._wanted_per_s = 0.0  # so that rounding errors do not add up over years

    def _end(self, entry: TrackedTask, error: NanoBananaError | None = None) -> None:
        """Stop watching: the task is final, or *error* is what every waiter gets."""
        entry.error = error
        self._drop(entry)
        self.memory.left.pop(entry.task_id)
        entry.ring()

    # --- the scheduler ----------------------------------------------------------------------------------------------

    def _pressure(self) -> float:
        return max(1.0, self._wanted_per_s / self._source.polls_per_s)

    def _plan(self, entry: TrackedTask, *, failures: int = 0) -> None:
        """Choose when to look next, after *failures* looks in a row that brought no answer."""
        now_s = anyio.current_time()
        if self._watched.get(entry.task_id) is not entry:  # everybody who waited has gone while a look was under way
            entry.later_s = now_s + self._schedule.policy.min_s
            return
        due_s = now_s + self._pause_s(entry, now_s, failures)
        if entry.confirm_s > entry.asked_s:
            due_s = min(due_s, max(now_s, entry.confirm_s))
        self._looks.plan(entry, due_s)

    def _pause_s(self, entry: TrackedTask, now_s: float, failures: int) -> float:
        if failures:
            return self._schedule.retry_s(failures)
        if not entry.looks and not entry.is_ours:
            return 0.0  # it may have ended long ago
        schedule = self._schedule
        if entry.task is not None and entry.task.status is TaskStatus.UNKNOWN:
            return schedule.jittered_s(schedule.policy.max_s)
        age_s = now_s - entry.born_s
        if entry.is_announced and self._unannounced < _DEAF_AFTER:
            return schedule.jittered_s(max(0.0, _NET * schedule.policy.max_s - (0 if entry.looks else age_s)))
        pause_s = schedule.pause_s(entry.model, age_s, entry.looks)
        self._wanted_per_s -= entry.wanted_per_s
        entry.wanted_per_s = 1 / max(pause_s, schedule.policy.min_s)
        self._wanted_per_s += entry.wanted_per_s
        if (pressure := self._pressure()) > 1:
            pause_s = schedule.pause_s(entry.model, age_s, entry.looks, pressure)
        return schedule.jittered_s(pause_s)

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._end_patience)
                group.start_soon(self._serve)
        except Exception as exc:  # noqa: BLE001 - a bug; nobody may be left waiting for a scheduler that is gone
            _log.exception("the tracker failed")
            self._running = False
            for entry in list(self._watched.values()):
                self._end(entry, TransportError(f"the tracker failed: {exc!r}", task_id=entry.task_id))

    async def _serve(self) -> None:
        """Look at whatever is due, the longest overdue first, for as long as the client lives."""
        while True:
            await self._looks.until_due()
            # The turn comes before the task: what is due queues in the heap, and not as coroutines.
            await self._source.take_turn()
            now_s = anyio.current_time()
            if self._looks.next_s() > now_s:
                self._source.drop_turn()  # whoever was due has gone while we queued
                continue
            entry = self._looks.pop()
            entry.asked_s = now_s
            entry.is_asked = True
            entry.looks += 1
            self._polls += 1
            self._in_flight += 1
            self._host.start_soon(partial(self._look, entry))

    async def _look(self, entry: TrackedTask) -> None:
        try:
            task = await self._source.look(entry.task_id)
        except AuthenticationError as exc:
            for other in list(self._watched.values()):
                self._end(other, about(exc, other.task_id))
        except TaskNotFound as exc:
            self._missed(entry, exc)
        except NanoBananaError as exc:
            # A late answer, not a failed task, unless the vendor himself says that the question is wrong.
            if isinstance(exc, InvalidRequest) and exc.status in (400, 422) and exc.code is not None:
                self._end(entry, exc)
            else:
                self._failed(entry, exc)
        except Exception as exc:  # noqa: BLE001 - a handed-in transport may raise anything, and must not stop the others
            _log.exception("task %s: the look failed in a way it must not", entry.task_id)
            self._end(
                entry, TransportError(f"the transport failed: {type(exc).__name__}: {exc}", task_id=entry.task_id)
            )
        else:
            self._saw(entry, task)
        finally:
            entry.is_asked = False
            self._in_flight -= 1

    def _failed(self, entry: TrackedTask, exc: NanoBananaError) -> None:
        """Back off, the longer the more looks failed in a row: at this task, or whichever tasks they were about."""
        self._failures += 1
        entry.failures += 1
        if self._failures == _WARN_AFTER:  # once for all: silence would look like a slow picture
            _log.warning("%d looks in a row brought no answer; looking on: %s", self._failures, exc)
        entry.trouble = str(exc)
        self._plan(entry, failures=max(self._failures, entry.failures))

    def _saw(self, entry: TrackedTask, task: Task) -> None:
        now_s = anyio.current_time()
        self._failures = 0
        entry.there_s, entry.late_since_s, entry.late_looks = now_s, math.inf, 0
        entry.failures, entry.trouble = 0, ""
        if entry.is_ours and entry.model is not None:
            age_s = now_s - entry.born_s
            self._schedule.learn(entry.model, entry.unfinished_s, age_s, done=task.is_final)
            entry.unfinished_s = age_s
        task = self.memory.finals.get(task.task_id) or task  # the first end stands, whatever the service says later
        known = entry.task
        if known is None or newer(known.status, task.status) is task.status:
            entry.task = task
        else:
            _log.debug("task %s was %s and is now said to be %s", task.task_id, known.status, task.status)
        if task.is_final:
            if entry.is_announced and entry.confirm_s == -math.inf:
                self._unannounced += 1
            self.memory.finish(task)
            self._end(entry)
            return
        if task.status is TaskStatus.UNKNOWN and not self._warned_of_status:
            self._warned_of_status = True
            _log.warning("task %s has a status that is not known here; it counts as running", task.task_id)
        self._plan(entry)
        if known is None or entry.task is not known:
            entry.ring()

    def _missed(self, entry: TrackedTask, exc: TaskNotFound) -> None:
        """Judge a 404: fresh ids are invisible for a while, foreign ones never seen do not exist."""
        now_s = anyio.current_time()
        if not entry.is_ours and entry.task is None:
            self._end(entry, exc)
            return
        if now_s - max(entry.born_s, entry.there_s) > NOT_FOUND_GRACE_S:
            entry.late_since_s = min(entry.late_since_s, now_s)
            entry.late_looks += 1
            if has_vanished(entry.late_looks, now_s - entry.late_since_s):
                self._end(entry, vanished(entry, exc))
                return
        entry.trouble = str(exc)
        self._plan(entry)
