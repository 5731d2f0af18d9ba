"""The state of the tracker: tracked tasks, waiters, caches and statistics."""

import copy
import math
from collections.abc import Mapping
from typing import Final

import attrs

from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async.errors import NanoBananaError, TaskNotFound
from nanobanana_async.models import Task

CONFIRM_INTERVAL_S: Final = 10.0
"""Minimum time between two polls that callbacks trigger, because callbacks are not authenticated."""


@attrs.frozen(kw_only=True)
class SubmitInfo:
    """What is known of a task before its first poll."""

    submitted_at_s: float | None = None
    """When the submit was accepted, on the event loop's clock; None if it was submitted elsewhere."""
    model: str | None = None
    has_callback: bool = False
    """Whether the service posts a callback when the task ends."""


@attrs.define(eq=False, weakref_slot=False)
class TrackedTask:
    """One tracked task. There may be a million of them, so it holds no containers."""

    task_id: str
    model: str | None
    submitted_at_s: float
    """When it was submitted; an estimate if it was submitted elsewhere."""
    submitted_here: bool
    """Whether this client submitted it, so that its age is known."""
    has_callback: bool = False
    """Whether a callback is expected."""
    waiters: "Waiter | None" = None
    """The first of its waiters. They are linked, so that adding and removing one takes constant time."""
    due_s: float = math.inf
    """Time of its next poll; infinity during a poll."""
    demand_per_s: float = 0.0
    """Polls per second that its schedule asks for."""
    later_s: float = -math.inf
    """Poll time to restore when a waiter returns to a suspended task."""
    polls: int = 0
    poll_in_flight: bool = False
    """Whether a poll is in flight."""
    consecutive_errors: int = 0
    """Consecutive polls without a response."""
    last_poll_s: float = -math.inf
    """When the last poll was sent."""
    confirm_at_s: float = -math.inf
    """Time of the last poll triggered by a callback, past or scheduled."""
    last_unfinished_age_s: float = 0.0
    """The age at which it was last seen unfinished."""
    snapshot: Task | None = None
    """The last snapshot. Its status never goes backwards."""
    error: NanoBananaError | None = None
    """The error for all its waiters, once tracking has ended."""
    last_error: str = ""
    """Text of the last poll error. An exception object would keep its response alive."""
    last_found_s: float = -math.inf
    """When the service last returned it."""
    missing_since_s: float = math.inf
    """Time of the first unexpected 404 in a series; infinity if there is none."""
    missing_polls: int = 0

    @property
    def is_final(self) -> bool:
        """Whether its last snapshot is final."""
        return self.snapshot is not None and self.snapshot.is_final

    def set_submit_info(self, submit_info: "SubmitInfo") -> None:
        """Store *submit_info*, unless it is already known."""
        if submit_info.submitted_at_s is not None and not self.submitted_here:
            self.submitted_here, self.submitted_at_s, self.model = True, submit_info.submitted_at_s, submit_info.model
            self.has_callback = submit_info.has_callback

    def add_waiter(self, waiter: "Waiter") -> None:
        """Add a waiter."""
        waiter.after = self.waiters
        if self.waiters is not None:
            self.waiters.before = waiter
        self.waiters = waiter

    def remove_waiter(self, waiter: "Waiter") -> None:
        """Remove a waiter. With the last one, drop the snapshot's images."""
        if waiter.before is not None:
            waiter.before.after = waiter.after
        else:
            self.waiters = waiter.after
        if waiter.after is not None:
            waiter.after.before = waiter.before
        waiter.before = waiter.after = None
        if self.waiters is None and (self.is_final or self.error is not None):
            self.snapshot = self.error = None

    def wake_all(self) -> None:
        """Wake all waiters."""
        waiter = self.waiters
        while waiter is not None:
            waiter.wake()
            waiter = waiter.after

    def request_confirmation(self, now_s: float) -> bool:
        """Schedule a poll at `confirm_at_s`. Return False if one is scheduled and the last was too recent."""
        if self.confirm_at_s > now_s:
            return False
        self.confirm_at_s = max(now_s, self.confirm_at_s + CONFIRM_INTERVAL_S)
        return True


@attrs.define(eq=False, weakref_slot=False)
class Waiter:
    """One waiter of a task. It allocates nothing more until `event` is awaited."""

    task: TrackedTask
    due_s: float = math.inf
    """Deadline of the wait."""
    event: OneShotEvent | None = None
    before: "Waiter | None" = None
    after: "Waiter | None" = None

    def wake(self) -> None:
        """Wake it."""
        if self.event is not None:
            self.event.set()


NO_TASK: Final = TrackedTask("", None, 0.0, submitted_here=False)
"""The task of a waiter that was removed."""


def with_task_id(exc: NanoBananaError, task_id: str) -> NanoBananaError:
    """Return a copy of *exc* about *task_id*."""
    mine = copy.copy(exc)
    mine.args = (str(exc).replace(exc.task_id or task_id, task_id),)
    mine.task_id = task_id
    return mine


def lost_task_error(tracked: TrackedTask, exc: TaskNotFound) -> TaskNotFound:
    """Return the error for the waiters of a task that the service has lost."""
    last = "never visible" if tracked.snapshot is None else f"last status {tracked.snapshot.status}"
    was = "was accepted and may have been charged" if tracked.submitted_here else "existed"
    what = f"task {tracked.task_id} {was}, but the service no longer knows it ({last}): {exc}"
    return TaskNotFound(what, status=exc.status, code=exc.code, task_id=tracked.task_id)


class TaskCache:
    """Tasks without waiters that the tracker remembers. All caches are bounded."""

    def __init__(self) -> None:
        self.finished: Final[FifoCache[Task]] = FifoCache(256)
        """Finished tasks, for late waiters. Tasks with inline images are not kept."""
        self.suspended: Final[FifoCache[TrackedTask]] = FifoCache(256)
        """Unfinished tasks without waiters. A waiter that returns resumes them."""
        self.submits: Final[FifoCache[SubmitInfo]] = FifoCache(4096)
        """Submits of this client, for handles created again from an id, as in the second request to a web app."""
        self.heard: Final[FifoCache[bool]] = FifoCache(4096)
        """Submits of this client whose callback arrived before they had a waiter."""

    def add_finished(self, task: Task) -> None:
        """Store a finished task."""
        if all(image.data is None for image in task.images):
            self.finished.add(task.task_id, task)


@attrs.frozen(kw_only=True)
class TrackerStatistics:
    """A snapshot of the client's tracker."""

    tracked: int
    """Unfinished tasks with at least one waiter."""
    in_flight: int
    """Polls in flight; never above `Limits.max_polls`."""
    overdue_tasks: int
    """Tasks whose poll is overdue, because it waits for a slot or the rate limiter."""
    overdue_s: float
    """Delay of the most overdue poll in seconds; 0.0 if there is none."""
    pressure: float
    """Demand for polls divided by what `Limits.requests_per_s` allows; at least 1.0."""
    polls: int
    """Polls sent since the client was created."""
    wakeups: int
    """Wake-ups of the scheduler since the client was created."""
    median_latency_s: Mapping[str, float]
    """Learned median latency in seconds, by model. Its resolution is that of the polls."""
    latency_models: Mapping[str, tuple[float, ...]] = attrs.field(repr=False)
    """Learned latency models, for `PollPolicy(latency_models=...)` of a later client. Plain numbers, valid in JSON."""
