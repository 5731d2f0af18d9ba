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
from nanobanana_async.tracking.schedule import DEFAULT_AGE_S, NOT_FOUND_GRACE_S, PollSchedule, is_lost, latest_status
from nanobanana_async.tracking.state import (
    NOBODYS,
    SubmitInfo,
    TaskCache,
    TrackedTask,
    TrackerStatistics,
    Waiter,
    lost_task_error,
    with_task_id,
)

_log: Final = logging.getLogger("nanobanana_async")

_TIMER_SLACK_S: Final = 0.2
_WARN_AFTER_ERRORS: Final = 3
_CALLBACK_INTERVAL_FACTOR: Final = 4
"""Times `PollPolicy.max_interval_s` between looks at a task whose end will be announced."""
_DISTRUST_CALLBACKS_AFTER: Final = 3
"""So many ends that were not announced, and announcements are no longer relied on until the next one comes."""


class PollSource(Protocol):
    """Where the tracker asks."""

    @property
    def polls_per_s(self) -> float:
        """How many queries may leave per second, as things stand."""
        ...

    async def acquire_poll_slot(self) -> None:
        """Return when one more query may leave: a slot is taken, and the pacer has agreed."""
        ...

    def release_poll_slot(self) -> None:
        """Give the slot back unused."""
        ...

    async def poll(self, task_id: str) -> Task:
        """Query once; gives the slot back."""
        ...


class TaskTracker:
    """Watches task ids for as long as somebody waits for them.

    Starts its coroutine with the first wait. One bad task, and one bad answer, never stops another task.
    """

    def __init__(self, source: PollSource, schedule: PollSchedule, background: BackgroundTaskGroup) -> None:
        self._source = source
        self._schedule = schedule
        self._background = background
        self._tasks: dict[str, TrackedTask] = {}
        self.cache: Final = TaskCache()
        grain_s = min(_TIMER_SLACK_S, schedule.policy.min_interval_s / 2)
        self._poll_queue: DelayQueue[TrackedTask] = DelayQueue(grain_s)
        self._timeout_queue: DelayQueue[Waiter] = DelayQueue(grain_s)
        self._demand_per_s = 0.0
        self._running = False
        self._consecutive_errors = 0
        self._in_flight = 0
        self._polls = 0
        self._warned_unrecognized = False
        self._missed_callbacks = 0
        """Tasks in a row whose end should have been announced, and was found by a look."""

    async def wait(self, task_id: str, *, timeout_s: float, submit_info: SubmitInfo = SubmitInfo()) -> Task:
        """Return the task once its status is final, whether it succeeded or failed.

        Shares polls with all who wait for the same id. Cancelling stops the waiting, not the task.

        Raises:
            TaskTimeout: *timeout_s* passed, or the client was closed; `exc.task` is the last snapshot.
            TaskNotFound: The service does not know the id.
            AuthenticationError: The service does not accept the key; this ends every wait.
            InvalidRequest: The service does not accept the id.
        """
        await self._background.ensure_started()
        if (final := self.cache.finished.get(task_id)) is not None:
            return final
        deadline_s = anyio.current_time() + timeout_s
        waiter = self.track(task_id, submit_info)
        try:
            while waiter.task.snapshot is None or not waiter.task.snapshot.is_final:
                await self._arm(waiter, deadline_s, timeout_s).wait()
            return waiter.task.snapshot
        finally:
            self.remove_waiter(waiter)

    async def updates(
        self, task_id: str, *, timeout_s: float, submit_info: SubmitInfo = SubmitInfo()
    ) -> AsyncGenerator[Task]:
        """Yield a snapshot at each change of status, the final one last. Raises as `wait` does."""
        await self._background.ensure_started()
        if (final := self.cache.finished.get(task_id)) is not None:
            yield final
            return
        deadline_s = anyio.current_time() + timeout_s
        waiter = self.track(task_id, submit_info)
        tracked, shown = waiter.task, None
        try:
            while shown is None or not shown.is_final:
                if tracked.snapshot is None or tracked.snapshot.status is shown:
                    await self._arm(waiter, deadline_s, timeout_s).wait()
                else:
                    shown = tracked.snapshot.status
                    yield tracked.snapshot
        finally:
            self.remove_waiter(waiter)

    def track(self, task_id: str, submit_info: SubmitInfo = SubmitInfo()) -> Waiter:
        """Have *task_id* looked at until it is final, or until `leave`. The host must be running."""
        submit_info = (
            submit_info if submit_info.submitted_at_s is not None else self.cache.submits.get(task_id) or submit_info
        )
        tracked = self._tasks.get(task_id)
        if tracked is None:
            tracked = self._tasks[task_id] = self.cache.suspended.pop(task_id) or self._create(task_id, submit_info)
            if not tracked.polls:
                self._schedule_poll(tracked)
            elif not tracked.poll_in_flight:
                self._poll_queue.schedule(tracked, tracked.later_s)
            if not self._running:
                self._running = True
                self._background.start_soon(self._run)
        tracked.set_submit_info(submit_info)
        waiter = Waiter(tracked)
        tracked.add_waiter(waiter)
        return waiter

    def _create(self, task_id: str, submit_info: SubmitInfo) -> TrackedTask:
        tracked = TrackedTask(task_id, None, anyio.current_time() - DEFAULT_AGE_S, submitted_here=False)
        tracked.set_submit_info(submit_info)
        if self.cache.heard.pop(task_id):
            tracked.request_confirmation(anyio.current_time())
        return tracked

    def remove_waiter(self, waiter: Waiter) -> None:
        """End *watch*; the last to leave ends the looking."""
        self._timeout_queue.remove(waiter)
        tracked, waiter.task = waiter.task, NOBODYS  # the agenda may hold on to it for a while
        tracked.remove_waiter(waiter)
        if tracked.waiters is None and self._tasks.get(tracked.task_id) is tracked:
            tracked.later_s = tracked.due_s
            self._untrack(tracked)
            self.cache.suspended.add(tracked.task_id, tracked)

    def notify(self, task_id: str) -> None:
        """Take the hint that there is news of *task_id*: it is looked at, at once if that did not just happen.

        Anybody may send a hint, so it buys at most one look per task in ten seconds, and none at ids nobody waits for.
        """
        tracked = self._tasks.get(task_id) or self.cache.suspended.get(task_id)
        if tracked is None and self.cache.submits.get(task_id) is not None:
            self.cache.heard.add(task_id, value=True)
        if tracked is None or not tracked.request_confirmation(anyio.current_time()):
            return
        self._missed_callbacks = 0
        tracked.later_s = tracked.confirm_at_s
        if tracked.confirm_at_s < tracked.due_s < math.inf:  # with a look under way, `_plan` will see to it
            self._poll_queue.schedule(tracked, tracked.confirm_at_s)

    def statistics(self) -> TrackerStatistics:
        """Return how things stand. O(watched)."""
        try:
            now_s = anyio.current_time()
        except RuntimeError:  # no event loop (any more): nothing is late
            now_s = -math.inf
        return TrackerStatistics(
            tracked=len(self._tasks),
            in_flight=self._in_flight,
            overdue_tasks=self._poll_queue.count_overdue(now_s),
            overdue_s=max(0.0, now_s - self._poll_queue.next_due_s()),
            pressure=self._pressure(),
            polls=self._polls,
            wakeups=self._poll_queue.wakeups,
            median_latency_s=self._schedule.median_latencies_s(),
            latency_models=self._schedule.latency_models(),
        )

    def close(self) -> None:
        """End every wait; the tasks themselves run on at the service."""
        for tracked in list(self._tasks.values()):
            reason = (
                f"the client was closed while waiting for task {tracked.task_id}; it runs on and can be awaited again"
            )
            self._finish(tracked, TaskTimeout(reason, task=tracked.snapshot, task_id=tracked.task_id))

    # --- who waits --------------------------------------------------------------------------------------------------

    def _arm(self, waiter: Waiter, deadline_s: float, timeout_s: float) -> OneShotEvent:
        """Return what rings when there may be news; raise what ended the watching, or that the time is up."""
        tracked = waiter.task
        if tracked.error is not None:
            raise copy.copy(tracked.error)  # each waiter its own: a shared one would collect everybody's traceback
        if anyio.current_time() < deadline_s:
            if waiter.due_s != deadline_s:
                self._timeout_queue.schedule(waiter, deadline_s)
            waiter.event = OneShotEvent()
            return waiter.event
        unheard = "its callback has not come" if tracked.has_callback else "nothing was heard of it"
        last = unheard if tracked.snapshot is None else f"it was {tracked.snapshot.status}"
        error = tracked.last_error and f" (the last look met: {tracked.last_error})"
        raise TaskTimeout(
            f"task {tracked.task_id} was not final within {timeout_s:.3g} s: {last}{error}. It runs on; wait again",
            task=tracked.snapshot,
            task_id=tracked.task_id,
        )

    async def _expire_waiters(self) -> None:
        """Wake each waiter whose time is up: one timer for all of them."""
        while True:
            await self._timeout_queue.wait_due()
            self._timeout_queue.pop().wake()

    def _untrack(self, tracked: TrackedTask) -> None:
        self._poll_queue.remove(tracked)
        self._demand_per_s -= tracked.demand_per_s
        tracked.demand_per_s = 0.0
        if self._tasks.get(tracked.task_id) is tracked:
            del self._tasks[tracked.task_id]
        if not self._tasks:
            self._demand_per_s = 0.0  # so that rounding errors do not add up over years

    def _finish(self, tracked: TrackedTask, error: NanoBananaError | None = None) -> None:
        """Stop watching: the task is final, or *error* is what every waiter gets."""
        tracked.error = error
        self._untrack(tracked)
        self.cache.suspended.pop(tracked.task_id)
        tracked.wake_all()

    # --- the scheduler ----------------------------------------------------------------------------------------------

    def _pressure(self) -> float:
        return max(1.0, self._demand_per_s / self._source.polls_per_s)

    def _schedule_poll(self, tracked: TrackedTask, *, failures: int = 0) -> None:
        """Choose when to look next, after *failures* looks in a row that brought no answer."""
        now_s = anyio.current_time()
        if self._tasks.get(tracked.task_id) is not tracked:  # everybody who waited has gone while a look was under way
            tracked.later_s = now_s + self._schedule.policy.min_interval_s
            return
        due_s = now_s + self._next_poll_in_s(tracked, now_s, failures)
        if tracked.confirm_at_s > tracked.last_poll_s:
            due_s = min(due_s, max(now_s, tracked.confirm_at_s))
        self._poll_queue.schedule(tracked, due_s)

    def _next_poll_in_s(self, tracked: TrackedTask, now_s: float, failures: int) -> float:
        if failures:
            return self._schedule.backoff_s(failures)
        if not tracked.polls and not tracked.submitted_here:
            return 0.0  # it may have ended long ago
        schedule = self._schedule
        if tracked.snapshot is not None and tracked.snapshot.status is TaskStatus.UNRECOGNIZED:
            return schedule.jittered_s(schedule.policy.max_interval_s)
        age_s = now_s - tracked.submitted_at_s
        if tracked.has_callback and self._missed_callbacks < _DISTRUST_CALLBACKS_AFTER:
            return schedule.jittered_s(
                max(0.0, _CALLBACK_INTERVAL_FACTOR * schedule.policy.max_interval_s - (0 if tracked.polls else age_s))
            )
        interval_s = schedule.next_poll_in_s(tracked.model, age_s, tracked.polls)
        self._demand_per_s -= tracked.demand_per_s
        tracked.demand_per_s = 1 / max(interval_s, schedule.policy.min_interval_s)
        self._demand_per_s += tracked.demand_per_s
        if (pressure := self._pressure()) > 1:
            interval_s = schedule.next_poll_in_s(tracked.model, age_s, tracked.polls, pressure)
        return schedule.jittered_s(interval_s)

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._expire_waiters)
                group.start_soon(self._poll_loop)
        except Exception as exc:  # noqa: BLE001 - a bug; nobody may be left waiting for a scheduler that is gone
            _log.exception("the tracker failed")
            self._running = False
            for tracked in list(self._tasks.values()):
                self._finish(tracked, TransportError(f"the tracker failed: {exc!r}", task_id=tracked.task_id))

    async def _poll_loop(self) -> None:
        """Look at whatever is due, the longest overdue first, for as long as the client lives."""
        while True:
            await self._poll_queue.wait_due()
            # The turn comes before the task: what is due queues in the heap, and not as coroutines.
            await self._source.acquire_poll_slot()
            now_s = anyio.current_time()
            if self._poll_queue.next_due_s() > now_s:
                self._source.release_poll_slot()  # whoever was due has gone while we queued
                continue
            tracked = self._poll_queue.pop()
            tracked.last_poll_s = now_s
            tracked.poll_in_flight = True
            tracked.polls += 1
            self._polls += 1
            self._in_flight += 1
            self._background.start_soon(partial(self._poll, tracked))

    async def _poll(self, tracked: TrackedTask) -> None:
        try:
            task = await self._source.poll(tracked.task_id)
        except AuthenticationError as exc:
            for other in list(self._tasks.values()):
                self._finish(other, with_task_id(exc, other.task_id))
        except TaskNotFound as exc:
            self._on_not_found(tracked, exc)
        except NanoBananaError as exc:
            # A late answer, not a failed task, unless the vendor himself says that the question is wrong.
            if isinstance(exc, InvalidRequest) and exc.status in (400, 422) and exc.code is not None:
                self._finish(tracked, exc)
            else:
                self._on_poll_error(tracked, exc)
        except Exception as exc:  # noqa: BLE001 - a handed-in transport may raise anything, and must not stop the others
            _log.exception("task %s: the look failed in a way it must not", tracked.task_id)
            self._finish(
                tracked, TransportError(f"the transport failed: {type(exc).__name__}: {exc}", task_id=tracked.task_id)
            )
        else:
            self._on_snapshot(tracked, task)
        finally:
            tracked.poll_in_flight = False
            self._in_flight -= 1

    def _on_poll_error(self, tracked: TrackedTask, exc: NanoBananaError) -> None:
        """Back off, the longer the more looks failed in a row: at this task, or whichever tasks they were about."""
        self._consecutive_errors += 1
        tracked.consecutive_errors += 1
        if self._consecutive_errors == _WARN_AFTER_ERRORS:  # once for all: silence would look like a slow picture
            _log.warning("%d looks in a row brought no answer; looking on: %s", self._consecutive_errors, exc)
        tracked.last_error = str(exc)
        self._schedule_poll(tracked, failures=max(self._consecutive_errors, tracked.consecutive_errors))

    def _on_snapshot(self, tracked: TrackedTask, task: Task) -> None:
        now_s = anyio.current_time()
        self._consecutive_errors = 0
        tracked.last_found_s, tracked.missing_since_s, tracked.missing_polls = now_s, math.inf, 0
        tracked.consecutive_errors, tracked.last_error = 0, ""
        if tracked.submitted_here and tracked.model is not None:
            age_s = now_s - tracked.submitted_at_s
            self._schedule.observe(tracked.model, tracked.last_unfinished_age_s, age_s, done=task.is_final)
            tracked.last_unfinished_age_s = age_s
        task = self.cache.finished.get(task.task_id) or task  # the first end stands, whatever the service says later
        known = tracked.snapshot
        if known is None or latest_status(known.status, task.status) is task.status:
            tracked.snapshot = task
        else:
            _log.debug("task %s was %s and is now said to be %s", task.task_id, known.status, task.status)
        if task.is_final:
            if tracked.has_callback and tracked.confirm_at_s == -math.inf:
                self._missed_callbacks += 1
            self.cache.add_finished(task)
            self._finish(tracked)
            return
        if task.status is TaskStatus.UNRECOGNIZED and not self._warned_unrecognized:
            self._warned_unrecognized = True
            _log.warning("task %s has a status that is not known here; it counts as running", task.task_id)
        self._schedule_poll(tracked)
        if known is None or tracked.snapshot is not known:
            tracked.wake_all()

    def _on_not_found(self, tracked: TrackedTask, exc: TaskNotFound) -> None:
        """Judge a 404: fresh ids are invisible for a while, foreign ones never seen do not exist."""
        now_s = anyio.current_time()
        if not tracked.submitted_here and tracked.snapshot is None:
            self._finish(tracked, exc)
            return
        if now_s - max(tracked.submitted_at_s, tracked.last_found_s) > NOT_FOUND_GRACE_S:
            tracked.missing_since_s = min(tracked.missing_since_s, now_s)
            tracked.missing_polls += 1
            if is_lost(tracked.missing_polls, now_s - tracked.missing_since_s):
                self._finish(tracked, lost_task_error(tracked, exc))
                return
        tracked.last_error = str(exc)
        self._schedule_poll(tracked)
