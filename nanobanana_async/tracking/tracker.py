"""`TaskTracker`: one coroutine that polls any number of tasks, with a bounded number of polls in flight.

The cost follows the polls that are due, not the tasks. A tracked task is an entry in a dict and one in a heap, not a
coroutine and not a timer.
"""

import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Final

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.delay_queue import DelayQueue
from nanobanana_async._concurrency.slots import Slot
from nanobanana_async.errors import (
    ApiError,
    AuthenticationError,
    InvalidRequest,
    NanoBananaError,
    TaskNotFound,
    TransportError,
)
from nanobanana_async.models import Eta, Task, TaskStatus
from nanobanana_async.tracking.callback_trust import CallbackTrust
from nanobanana_async.tracking.schedule import DEFAULT_AGE_S, Lost, PollSchedule, Presence, latest_status
from nanobanana_async.tracking.state import (
    PollSource,
    SubmitInfo,
    TaskCache,
    TaskState,
    TrackedTask,
    TrackerStatistics,
    Waiter,
    closed_error,
    lost_task_error,
    with_task_id,
)
from nanobanana_async.tracking.waiters import WaiterDeadlines

_log: Final = logging.getLogger("nanobanana_async")
_TIMER_SLACK_S: Final = 0.2
_WARN_AFTER_ERRORS: Final = 3
_CALLBACK_INTERVAL_FACTOR: Final = 4
"""Poll interval of a task with a pending callback, in multiples of `PollPolicy.max_interval_s`."""


class TaskTracker:
    """Tracks task ids as long as they have waiters. All waiters of one task share its polls.

    The coroutine starts with the first wait. A task that fails, or a response that cannot be decoded, never stops
    another task. *on_change* is called with each snapshot whose status is new, and the time that is left.
    """

    def __init__(
        self,
        source: PollSource,
        schedule: PollSchedule,
        background: BackgroundTaskGroup,
        on_change: Callable[[SubmitInfo, Task, Eta | None], None] = lambda _, __, ___: None,
    ) -> None:
        self._on_change = on_change
        self._source = source
        self._schedule = schedule
        self._background = background
        self._tasks: dict[str, TrackedTask] = {}
        """Tasks with waiters."""
        self._unwatched: dict[str, TrackedTask] = {}
        """Tasks whose last waiter left during a poll, until the poll has ended."""
        self.cache: Final = TaskCache()
        grain_s = min(_TIMER_SLACK_S, schedule.policy.min_interval_s / 2)
        self._poll_queue: DelayQueue[TrackedTask] = DelayQueue(grain_s)
        self._deadlines = WaiterDeadlines(grain_s)
        self._demand_per_s = 0.0
        self._running = False
        self._consecutive_errors = 0
        self._in_flight = 0
        self._polls = 0
        self._slow_tasks = 0
        self._warned_unrecognized = False
        self._callback_trust = CallbackTrust()

    async def wait(self, task_id: str, *, timeout_s: float, submit_info: SubmitInfo = SubmitInfo()) -> Task:
        """Return the task once its status is final. Cancelling stops the wait, not the task.

        Raises:
            TaskTimeout: *timeout_s* passed, or the client was closed. `exc.task` is the last snapshot.
            TaskNotFound, TaskLost: The service does not know the task, or no longer.
            AuthenticationError, InvalidRequest: The service rejected the key, which ends every wait, or the task id.
        """
        await self._background.ensure_started()
        if (final := self.cache.finished(task_id)) is not None:
            return final
        deadline_s = anyio.current_time() + timeout_s
        tracked, waiter = self.track(task_id, submit_info)
        try:
            while tracked.snapshot is None or not tracked.snapshot.is_final:
                await self._deadlines.arm(tracked, waiter, deadline_s, timeout_s).wait()
            return tracked.snapshot
        finally:
            self.remove_waiter(tracked, waiter)

    async def updates(
        self, task_id: str, *, timeout_s: float, submit_info: SubmitInfo = SubmitInfo(), every_s: float = math.inf
    ) -> AsyncGenerator[Task]:
        """Yield a snapshot at each change of status, or after *every_s*, ending with the final one. See `wait`."""
        await self._background.ensure_started()
        if (final := self.cache.finished(task_id)) is not None:
            yield final
            return
        deadline_s = anyio.current_time() + timeout_s
        tracked, waiter = self.track(task_id, submit_info)
        shown, tick_s = None, anyio.current_time() + every_s
        try:
            while shown is None or not shown.is_final:
                snapshot = tracked.snapshot or Task(task_id=task_id, status=TaskStatus.PENDING)
                is_new = tracked.snapshot is not None and snapshot.status is not shown
                if is_new or anyio.current_time() >= tick_s:
                    shown, tick_s = snapshot.status, anyio.current_time() + every_s
                    yield snapshot
                else:
                    event = self._deadlines.arm(tracked, waiter, deadline_s, timeout_s)
                    with anyio.CancelScope(deadline=tick_s):
                        await event.wait()
        finally:
            self.remove_waiter(tracked, waiter)

    def track(self, task_id: str, submit_info: SubmitInfo = SubmitInfo()) -> tuple[TrackedTask, Waiter]:
        """Poll *task_id* until it is final, or until `remove_waiter`. The background tasks must be started."""
        if submit_info.submitted_at_s is None:
            submit_info = self.cache.submits.get(task_id) or submit_info
        tracked = self._tasks.get(task_id)
        if tracked is None:
            tracked = self._tasks[task_id] = self._recall(task_id)
            if submit_info.submitted_at_s is not None:
                tracked.submit = submit_info
            if tracked.state is not TaskState.POLLING:
                self._schedule_poll(tracked)
            if not self._running:
                self._running = True
                self._background.start_soon(self._run)
        waiter = Waiter()
        tracked.waiters.append(waiter)
        return tracked, waiter

    def _recall(self, task_id: str) -> TrackedTask:
        """Return the suspended task, or a new one."""
        tracked = self._unwatched.pop(task_id, None) or self.cache.tasks.pop(task_id)
        if tracked is not None and tracked.state is not TaskState.FINISHED:
            return tracked
        guess_s = anyio.current_time() - DEFAULT_AGE_S
        return TrackedTask(task_id, SubmitInfo(submitted_at_s=guess_s, is_estimate=True))

    def remove_waiter(self, tracked: TrackedTask, waiter: Waiter) -> None:
        """Remove *waiter*. The last one ends the polling."""
        self._deadlines.remove(waiter)
        if waiter in tracked.waiters:  # all are removed when the task is finished
            tracked.waiters.remove(waiter)
        if not tracked.waiters and self._tasks.get(tracked.task_id) is tracked:
            self._untrack(tracked)
            if tracked.state is TaskState.POLLING:
                self._unwatched[tracked.task_id] = tracked
            else:
                self._suspend(tracked)

    def _suspend(self, tracked: TrackedTask) -> None:
        tracked.state = TaskState.SUSPENDED
        self.cache.tasks.add(tracked.task_id, tracked)

    def notify(self, task_id: str) -> None:
        """Poll *task_id* soon, because a callback reported a change.

        Callbacks are not authenticated, so they trigger at most one poll per task in ten seconds, and none without
        waiters.
        """
        tracked = self._tasks.get(task_id) or self._unwatched.get(task_id) or self.cache.tasks.get(task_id)
        if tracked is None:
            if (submit := self.cache.submits.get(task_id)) is None:
                return
            tracked = TrackedTask(task_id, submit)
            self.cache.tasks.add(task_id, tracked)
        self._callback_trust.record_callback()
        if tracked.state is TaskState.FINISHED or not tracked.request_confirmation(anyio.current_time()):
            return
        if tracked.state is TaskState.SCHEDULED and tracked.confirm_at_s < tracked.due_s:
            self._poll_queue.schedule(tracked, tracked.confirm_at_s)  # after a poll in flight, `_next_poll_s` sees it

    def statistics(self) -> TrackerStatistics:
        """Return a snapshot of the tracker. O(tracked tasks)."""
        now_s = -math.inf  # without a running event loop, nothing is overdue
        with contextlib.suppress(RuntimeError):
            now_s = anyio.current_time()
        return TrackerStatistics(
            tracked=len(self._tasks),
            in_flight=self._in_flight,
            overdue_tasks=self._poll_queue.count_overdue(now_s),
            overdue_s=max(0.0, now_s - self._poll_queue.next_due_s()),
            pressure=self._pressure(),
            polls=self._polls,
            slow_tasks=self._slow_tasks,
            wakeups=self._poll_queue.wakeups,
            median_latency_s=self._schedule.median_latencies_s(),
            latency_models=self._schedule.latency_models(),
        )

    def eta(self, submit: SubmitInfo, wait_s: float = 0.0) -> Eta | None:
        """Return the time left until a task is final, or one that is submitted in *wait_s*; None if it is not known."""
        if submit.is_estimate or (submit.kind is None and submit.submitted_at_s is None):
            return None
        age_s = 0.0 if submit.submitted_at_s is None else max(0.0, anyio.current_time() - submit.submitted_at_s)
        eta = self._schedule.eta(submit.kind, age_s, self._pressure())
        return Eta(median_s=wait_s + eta.median_s, p90_s=wait_s + eta.p90_s)

    def close(self) -> None:
        """End every wait. The tasks keep running at the service."""
        for tracked in list(self._tasks.values()):
            self._finish(tracked, closed_error(tracked))

    def _untrack(self, tracked: TrackedTask) -> None:
        self._poll_queue.remove(tracked)
        self._set_demand(tracked, 0.0)
        if self._tasks.get(tracked.task_id) is tracked:
            del self._tasks[tracked.task_id]
        if not self._tasks:
            self._demand_per_s = 0.0  # reset, so that rounding errors do not add up

    def _finish(self, tracked: TrackedTask, error: NanoBananaError | None = None) -> None:
        """Stop tracking: the task is final, or *error* is raised in every waiter."""
        tracked.state, tracked.error = TaskState.FINISHED, error
        self._untrack(tracked)
        self._unwatched.pop(tracked.task_id, None)
        self.cache.tasks.pop(tracked.task_id)
        if error is None and tracked.snapshot is not None and not tracked.snapshot.has_inline_image:
            self.cache.tasks.add(tracked.task_id, tracked)
        tracked.wake_all()
        tracked.waiters.clear()

    # --- the scheduler ----------------------------------------------------------------------------------------------

    def _pressure(self) -> float:
        return max(1.0, self._demand_per_s / self._source.polls_per_s)

    def _set_demand(self, tracked: TrackedTask, polls_per_s: float) -> None:
        self._demand_per_s += polls_per_s - tracked.demand_per_s
        tracked.demand_per_s = polls_per_s

    def _schedule_poll(self, tracked: TrackedTask, *, failures: int = 0, not_before_s: float | None = None) -> None:
        """Schedule the next poll, after *failures* consecutive polls without a response, or at *not_before_s*."""
        if self._tasks.get(tracked.task_id) is not tracked:  # all waiters left during the poll
            if self._unwatched.pop(tracked.task_id, None) is not None:
                self._suspend(tracked)
            return
        now_s = anyio.current_time()
        is_next = tracked.state is TaskState.POLLING or not tracked.history.count
        from_s = now_s if is_next else tracked.history.sent_s
        due_s = from_s + (self._schedule.backoff_s(failures) if failures else self._interval_s(tracked, from_s))
        if tracked.confirm_at_s > tracked.history.sent_s:
            due_s = min(due_s, tracked.confirm_at_s)
        tracked.state = TaskState.SCHEDULED
        self._poll_queue.schedule(tracked, max(now_s, due_s) if not_before_s is None else not_before_s)

    def _interval_s(self, tracked: TrackedTask, from_s: float) -> float:
        """Return the seconds from *from_s* to the next poll."""
        schedule, polls, submit = self._schedule, tracked.history.count, tracked.submit
        if not polls and submit.is_estimate:
            return 0.0  # it may have finished long ago
        if tracked.snapshot is not None and tracked.snapshot.status is TaskStatus.UNRECOGNIZED:
            return schedule.jittered_s(schedule.policy.max_interval_s)
        age_s = tracked.age_s(from_s)
        if submit.callback_url is not None and self._callback_trust.is_given:
            wait_s = _CALLBACK_INTERVAL_FACTOR * schedule.policy.max_interval_s - (0 if polls else age_s)
            return schedule.jittered_s(max(0.0, wait_s))
        interval_s = schedule.next_poll_in_s(submit.kind, age_s, polls)
        self._set_demand(tracked, 1 / max(interval_s, schedule.policy.min_interval_s))
        if (pressure := self._pressure()) > 1:
            interval_s = schedule.next_poll_in_s(submit.kind, age_s, polls, pressure)
        return schedule.jittered_s(interval_s)

    async def _run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._deadlines.run)
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
            slot = await self._source.acquire_poll_slot()
            if self._poll_queue.next_due_s() <= anyio.current_time():
                self._begin_poll(self._poll_queue.pop(), slot)
            else:
                slot.release()  # the due task was removed during the wait for the slot

    def _begin_poll(self, tracked: TrackedTask, slot: Slot) -> None:
        count = tracked.history.count + 1
        tracked.history = attrs.evolve(tracked.history, count=count, sent_s=anyio.current_time())
        tracked.state = TaskState.POLLING
        self._polls += 1
        self._in_flight += 1
        self._background.start_soon(partial(self._poll, tracked, slot))

    async def _poll(self, tracked: TrackedTask, slot: Slot) -> None:
        try:
            with slot:
                task = await self._source.poll(tracked.task_id)
        except AuthenticationError as exc:
            for other in [tracked, *self._tasks.values()]:
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
            self._in_flight -= 1

    def _on_poll_error(self, tracked: TrackedTask, exc: NanoBananaError) -> None:
        """Back off after a failed poll, by the larger number of consecutive failures, of this task or of all tasks."""
        if isinstance(exc, ApiError) and exc.retry_after_s is not None:  # throttled, which is no outage
            tracked.history = attrs.evolve(tracked.history, last_error=str(exc))
            self._schedule_poll(tracked, not_before_s=anyio.current_time() + exc.retry_after_s)
            return
        self._consecutive_errors += 1
        errors = tracked.history.consecutive_errors + 1
        # Once per outage. Without a warning, an outage looks like a slow image.
        if self._consecutive_errors == _WARN_AFTER_ERRORS:
            _log.warning("%d consecutive polls failed; polling continues: %s", self._consecutive_errors, exc)
        tracked.history = attrs.evolve(tracked.history, consecutive_errors=errors, last_error=str(exc))
        self._schedule_poll(tracked, failures=max(self._consecutive_errors, errors))

    def _on_snapshot(self, tracked: TrackedTask, task: Task) -> None:
        now_s, submit = anyio.current_time(), tracked.submit
        self._consecutive_errors = 0
        if submit.kind is not None and not submit.is_estimate:
            self._learn(tracked, submit.kind, now_s, done=task.is_final)
        tracked.presence = Presence(last_found_s=now_s)
        tracked.history = attrs.evolve(tracked.history, consecutive_errors=0, last_error="")
        known = tracked.snapshot
        # The first final status stays, whatever the service reports later.
        task = self.cache.finished(task.task_id) or task
        if known is None or latest_status(known.status, task.status) is task.status:
            tracked.snapshot = task
        else:
            _log.debug("task %s went from %s to %s; ignored", task.task_id, known.status, task.status)
        if known is None or known.status is not task.status:
            self._on_change(submit, task, None if task.is_final else self.eta(submit))
        if task.is_final:
            if submit.callback_url is not None and tracked.confirm_at_s == -math.inf:
                self._callback_trust.record_missed(submit.callback_url)
            self._finish(tracked)
            return
        if task.status is TaskStatus.UNRECOGNIZED and not self._warned_unrecognized:
            self._warned_unrecognized = True
            _log.warning("task %s has an unrecognized status; treated as running", task.task_id)
        self._schedule_poll(tracked)
        if tracked.snapshot is not known:
            tracked.wake_all()

    def _learn(self, tracked: TrackedTask, kind: str, now_s: float, *, done: bool) -> None:
        """Learn from a snapshot. Mark the task as slow, once, if few tasks take that long."""
        age_s = tracked.age_s(now_s)
        if not done and not tracked.is_slow and self._schedule.is_slow(kind, age_s):
            tracked.is_slow = True
            self._slow_tasks += 1
            _log.warning("task %s is slow: not final after %.0f s", tracked.task_id, age_s)
        self._schedule.observe(kind, max(0.0, tracked.age_s(tracked.presence.last_found_s)), age_s, done=done)

    def _on_not_found(self, tracked: TrackedTask, exc: TaskNotFound) -> None:
        """Handle a 404. A foreign id that was never seen does not exist."""
        if tracked.submit.is_estimate and tracked.snapshot is None:
            self._finish(tracked, exc)
            return
        presence = tracked.presence.after_404(anyio.current_time(), tracked.submit.submitted_at_s or 0.0)
        if isinstance(presence, Lost):
            self._finish(tracked, lost_task_error(tracked, exc))
            return
        tracked.presence = presence
        tracked.history = attrs.evolve(tracked.history, last_error=str(exc))
        self._schedule_poll(tracked)
