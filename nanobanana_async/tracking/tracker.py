"""`TaskTracker`: one coroutine that polls any number of tasks, with a bounded number of polls in flight.

The cost follows the polls that are due, not the tasks. A tracked task is an entry in a dict and one in a heap, not a
coroutine and not a timer. All waiters of one task share its polls. When the last one leaves, the task is no longer
tracked.
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
    NO_TASK,
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
"""Poll interval of a task with a pending callback, in multiples of `PollPolicy.max_interval_s`."""
_DISTRUST_CALLBACKS_AFTER: Final = 3
"""Consecutive missed callbacks after which polling no longer relies on them, until one arrives."""


class PollSource(Protocol):
    """Sends the tracker's polls."""

    @property
    def polls_per_s(self) -> float:
        """Polls that may be sent per second at present."""
        ...

    async def acquire_poll_slot(self) -> None:
        """Return when one more poll may be sent. The caller then holds a slot."""
        ...

    def release_poll_slot(self) -> None:
        """Give back a slot that was not used."""
        ...

    async def poll(self, task_id: str) -> Task:
        """Query once. Gives the slot back."""
        ...


class TaskTracker:
    """Tracks task ids as long as they have waiters.

    The coroutine starts with the first wait. A task that fails, or a response that cannot be decoded, never stops
    another task.
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
        """Consecutive tasks whose end was found by a poll although a callback was expected."""

    async def wait(self, task_id: str, *, timeout_s: float, submit_info: SubmitInfo = SubmitInfo()) -> Task:
        """Return the task once its status is final, whether it succeeded or failed.

        All waiters of one task share its polls. Cancelling stops the wait, not the task.

        Raises:
            TaskTimeout: *timeout_s* passed, or the client was closed. `exc.task` is the last snapshot.
            TaskNotFound: The service does not know the task.
            AuthenticationError: The service rejected the key. This ends every wait.
            InvalidRequest: The service rejected the task id.
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
        """Yield a snapshot at each change of status, ending with the final one. Raises as `wait` does."""
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
        """Poll *task_id* until it is final, or until `remove_waiter`. The background tasks must be started."""
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
        """Remove *waiter*. The last one ends the polling."""
        self._timeout_queue.remove(waiter)
        tracked, waiter.task = waiter.task, NO_TASK  # the delay queue may keep a reference for a while
        tracked.remove_waiter(waiter)
        if tracked.waiters is None and self._tasks.get(tracked.task_id) is tracked:
            tracked.later_s = tracked.due_s
            self._untrack(tracked)
            self.cache.suspended.add(tracked.task_id, tracked)

    def notify(self, task_id: str) -> None:
        """Poll *task_id* soon, because a callback reported a change.

        Callbacks are not authenticated, so they trigger at most one poll per task in ten seconds, and none without
        waiters.
        """
        tracked = self._tasks.get(task_id) or self.cache.suspended.get(task_id)
        if tracked is None and self.cache.submits.get(task_id) is not None:
            self.cache.heard.add(task_id, value=True)
        if tracked is None or not tracked.request_confirmation(anyio.current_time()):
            return
        self._missed_callbacks = 0
        tracked.later_s = tracked.confirm_at_s
        if tracked.confirm_at_s < tracked.due_s < math.inf:  # with a poll in flight, `_schedule_poll` handles it
            self._poll_queue.schedule(tracked, tracked.confirm_at_s)

    def statistics(self) -> TrackerStatistics:
        """Return a snapshot of the tracker. O(tracked tasks)."""
        try:
            now_s = anyio.current_time()
        except RuntimeError:  # no running event loop: nothing is overdue
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
        """End every wait. The tasks keep running at the service."""
        for tracked in list(self._tasks.values()):
            reason = (
                f"client: was closed while waiting for task {tracked.task_id}. "
                "It keeps running; you can wait on it again."
            )
            self._finish(tracked, TaskTimeout(reason, task=tracked.snapshot, task_id=tracked.task_id))

    # --- waiters ----------------------------------------------------------------------------------------------------

    def _arm(self, waiter: Waiter, deadline_s: float, timeout_s: float) -> OneShotEvent:
        """Return an event that is set at the next change. Raise the error that ended tracking, or TaskTimeout."""
        tracked = waiter.task
        if tracked.error is not None:
            raise copy.copy(tracked.error)  # a copy per waiter: a shared one would collect all their tracebacks
        if anyio.current_time() < deadline_s:
            if waiter.due_s != deadline_s:
                self._timeout_queue.schedule(waiter, deadline_s)
            waiter.event = OneShotEvent()
            return waiter.event
        pending = "waiting for its callback" if tracked.has_callback else "without a status"
        status = pending if tracked.snapshot is None else tracked.snapshot.status
        error = tracked.last_error and f" (last poll failed: {tracked.last_error})"
        raise TaskTimeout(
            f"task {tracked.task_id} still {status} after {timeout_s:.3g} s{error}. "
            "It keeps running; you can wait on it again.",
            task=tracked.snapshot,
            task_id=tracked.task_id,
        )

    async def _expire_waiters(self) -> None:
        """Wake each waiter whose deadline has passed. One timer serves all of them."""
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
            self._demand_per_s = 0.0  # reset, so that rounding errors do not add up

    def _finish(self, tracked: TrackedTask, error: NanoBananaError | None = None) -> None:
        """Stop tracking: the task is final, or *error* is raised in every waiter."""
        tracked.error = error
        self._untrack(tracked)
        self.cache.suspended.pop(tracked.task_id)
        tracked.wake_all()

    # --- the scheduler ----------------------------------------------------------------------------------------------

    def _pressure(self) -> float:
        return max(1.0, self._demand_per_s / self._source.polls_per_s)

    def _schedule_poll(self, tracked: TrackedTask, *, failures: int = 0) -> None:
        """Schedule the next poll, after *failures* consecutive polls without a response."""
        now_s = anyio.current_time()
        if self._tasks.get(tracked.task_id) is not tracked:  # all waiters left during the poll
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
            return 0.0  # it may have finished long ago
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
        except Exception as exc:  # noqa: BLE001 - a bug; no waiter may be left without a scheduler
            _log.exception("the tracker failed")
            self._running = False
            for tracked in list(self._tasks.values()):
                self._finish(tracked, TransportError(f"the tracker failed: {exc!r}", task_id=tracked.task_id))

    async def _poll_loop(self) -> None:
        """Poll the tasks that are due, the most overdue first, until the client is closed."""
        while True:
            await self._poll_queue.wait_due()
            # Acquire the slot before the task is chosen: due tasks wait in the heap, not as coroutines.
            await self._source.acquire_poll_slot()
            now_s = anyio.current_time()
            if self._poll_queue.next_due_s() > now_s:
                self._source.release_poll_slot()  # the due task was removed during the wait for the slot
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
            # Treat as transient unless the service rejected the query itself.
            if isinstance(exc, InvalidRequest) and exc.status in (400, 422) and exc.code is not None:
                self._finish(tracked, exc)
            else:
                self._on_poll_error(tracked, exc)
        except Exception as exc:  # noqa: BLE001 - a user's transport may raise anything and must not stop the others
            _log.exception("task %s: poll raised an unexpected error", tracked.task_id)
            self._finish(
                tracked, TransportError(f"the transport failed: {type(exc).__name__}: {exc}", task_id=tracked.task_id)
            )
        else:
            self._on_snapshot(tracked, task)
        finally:
            tracked.poll_in_flight = False
            self._in_flight -= 1

    def _on_poll_error(self, tracked: TrackedTask, exc: NanoBananaError) -> None:
        """Back off after a failed poll, by the larger number of consecutive failures, of this task or of all tasks."""
        self._consecutive_errors += 1
        tracked.consecutive_errors += 1
        # Once per outage. Without a warning, an outage looks like a slow image.
        if self._consecutive_errors == _WARN_AFTER_ERRORS:
            _log.warning("%d consecutive polls failed; polling continues: %s", self._consecutive_errors, exc)
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
        task = (
            self.cache.finished.get(task.task_id) or task
        )  # the first final status stays, whatever the service reports later
        known = tracked.snapshot
        if known is None or latest_status(known.status, task.status) is task.status:
            tracked.snapshot = task
        else:
            _log.debug("task %s went from %s to %s; ignored", task.task_id, known.status, task.status)
        if task.is_final:
            if tracked.has_callback and tracked.confirm_at_s == -math.inf:
                self._missed_callbacks += 1
            self.cache.add_finished(task)
            self._finish(tracked)
            return
        if task.status is TaskStatus.UNRECOGNIZED and not self._warned_unrecognized:
            self._warned_unrecognized = True
            _log.warning("task %s has an unrecognized status; treated as running", task.task_id)
        self._schedule_poll(tracked)
        if known is None or tracked.snapshot is not known:
            tracked.wake_all()

    def _on_not_found(self, tracked: TrackedTask, exc: TaskNotFound) -> None:
        """Handle a 404. A new task may be invisible for a while. A foreign id that was never seen does not exist."""
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
