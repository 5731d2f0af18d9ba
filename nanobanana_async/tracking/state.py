"""The state of the tracker: tracked tasks, waiters, caches and statistics."""

import copy
import enum
import math
from collections.abc import Mapping
from typing import Final, Protocol

import attrs

from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async._concurrency.slots import Slot
from nanobanana_async.errors import NanoBananaError, TaskLost, TaskNotFound, TaskTimeout
from nanobanana_async.models import Task
from nanobanana_async.tracking.schedule import NEVER_FOUND, NO_POLLS, PollHistory, Presence

CONFIRM_INTERVAL_S: Final = 10.0
"""Minimum time between two polls that callbacks trigger, because callbacks are not authenticated."""


class PollSource(Protocol):
    """Sends the tracker's polls."""

    @property
    def polls_per_s(self) -> float:
        """Polls that may be sent per second at present."""
        ...

    async def acquire_poll_slot(self) -> Slot:
        """Return a slot once one more poll may be sent."""
        ...

    async def poll(self, task_id: str) -> Task:
        """Query once."""
        ...


class TaskState(enum.Enum):
    """What the tracker does about a task."""

    SCHEDULED = "scheduled"
    """It has a waiter, and a poll at `due_s`."""
    POLLING = "polling"
    """A poll is in flight."""
    SUSPENDED = "suspended"
    """It has no waiter. One that comes resumes it."""
    FINISHED = "finished"
    """It has a final snapshot or an error, and is not polled again."""


@attrs.frozen(kw_only=True)
class SubmitInfo:
    """What is known of a task before its first poll."""

    submitted_at_s: float | None = None
    """When the submit was accepted, on the event loop's clock; None if it was submitted elsewhere."""
    kind: str | None = None
    """`latency_kind` of the request; None if it is not known."""
    is_estimate: bool = False
    """Whether the time is an estimate, because the task was submitted elsewhere."""
    callback_url: str | None = None
    """Where the service posts a callback when the task ends, without the token; None if it posts none."""
    key: str | None = None
    """Identifies the call that submitted it, for events; None if it was submitted elsewhere."""
    owner: str | None = None
    """Whom the task is for."""


@attrs.define(eq=False, weakref_slot=False)
class Waiter:
    """One waiter of a task. It allocates nothing more until `event` is awaited."""

    due_s: float = math.inf
    """Deadline of the wait."""
    event: OneShotEvent | None = None

    def wake(self) -> None:
        """Wake it."""
        if self.event is not None:
            self.event.set()


@attrs.define(eq=False, weakref_slot=False)
class TrackedTask:
    """One tracked task. There may be a hundred thousand of them."""

    task_id: str
    submit: SubmitInfo
    waiters: list[Waiter] = attrs.field(factory=list[Waiter])
    state: TaskState = TaskState.SUSPENDED
    due_s: float = math.inf
    """Time of its next poll; infinity unless it is scheduled."""
    demand_per_s: float = 0.0
    """Polls per second that its schedule asks for."""
    history: PollHistory = NO_POLLS
    presence: Presence = NEVER_FOUND
    confirm_at_s: float = -math.inf
    """Time of the last poll triggered by a callback, past or scheduled."""
    snapshot: Task | None = None
    """The last snapshot. Its status never goes backwards."""
    is_slow: bool = False
    """Whether it was marked as slow."""
    error: NanoBananaError | None = None
    """The error for all its waiters, if tracking ended with one."""

    def age_s(self, at_s: float) -> float:
        """Return the seconds from the submit to *at_s*."""
        return at_s - (self.submit.submitted_at_s or 0.0)

    def wake_all(self) -> None:
        """Wake all waiters."""
        for waiter in self.waiters:
            waiter.wake()

    def request_confirmation(self, now_s: float) -> bool:
        """Schedule a poll at `confirm_at_s`. Return False if one is scheduled and the last was too recent."""
        if self.confirm_at_s > now_s:
            return False
        self.confirm_at_s = max(now_s, self.confirm_at_s + CONFIRM_INTERVAL_S)
        return True


def with_task_id(exc: NanoBananaError, task_id: str) -> NanoBananaError:
    """Return a copy of *exc* about *task_id*."""
    mine = copy.copy(exc)
    mine.args = (str(exc).replace(exc.task_id or task_id, task_id),)
    mine.task_id = task_id
    return mine


def lost_task_error(tracked: TrackedTask, exc: TaskNotFound) -> TaskLost:
    """Return the error for the waiters of a task that the service has lost."""
    last = "never visible" if tracked.snapshot is None else f"last status {tracked.snapshot.status}"
    was = "existed" if tracked.submit.is_estimate else "was accepted and may have been charged"
    what = f"task {tracked.task_id} {was}, but the service no longer knows it ({last}): {exc}"
    return TaskLost(what, task=tracked.snapshot, task_id=tracked.task_id)


def timeout_error(tracked: TrackedTask, timeout_s: float) -> TaskTimeout:
    """Return the error for a waiter whose deadline has passed."""
    pending = "waiting for its callback" if tracked.submit.callback_url else "without a status"
    status = pending if tracked.snapshot is None else tracked.snapshot.status
    error = tracked.history.last_error and f" (last poll failed: {tracked.history.last_error})"
    what = f"task {tracked.task_id} still {status} after {timeout_s:.3g} s{error}. "
    what += "It keeps running; you can wait on it again."
    return TaskTimeout(what, task=tracked.snapshot, task_id=tracked.task_id)


def closed_error(tracked: TrackedTask) -> TaskTimeout:
    """Return the error for the waiters of a task when the client is closed."""
    what = f"client: was closed while waiting for task {tracked.task_id}. It keeps running; wait on it again."
    return TaskTimeout(what, task=tracked.snapshot, task_id=tracked.task_id)


class TaskCache:
    """What the tracker remembers of tasks without waiters. Both caches are bounded."""

    def __init__(self) -> None:
        self.submits: Final[FifoCache[SubmitInfo]] = FifoCache(4096)
        """Submits of this client, for handles created again from an id, as in the second request to a web app."""
        self.tasks: Final[FifoCache[TrackedTask]] = FifoCache(1024)
        """Suspended tasks, and finished ones for late waiters."""

    def finished(self, task_id: str) -> Task | None:
        """Return the final snapshot of a finished task, or None."""
        tracked = self.tasks.get(task_id)
        return tracked.snapshot if tracked is not None and tracked.state is TaskState.FINISHED else None


@attrs.frozen(kw_only=True)
class TrackerStatistics:
    """A snapshot of a client: its tracker, and what it has received.

    Attributes:
        tracked: Unfinished tasks with at least one waiter.
        in_flight: Polls in flight; never above `Limits.max_polls`.
        overdue_tasks: Tasks whose poll is overdue, because it waits for a slot or the rate limiter.
        overdue_s: Delay of the most overdue poll in seconds; 0.0 if there is none.
        pressure: Demand for polls divided by what `Limits.requests_per_s` allows; at least 1.0.
        polls: Polls sent since the client was created.
        slow_tasks: Tasks that took longer than all but one in a thousand, since the client was created.
        wakeups: Wake-ups of the scheduler since the client was created.
        median_latency_s: Learned median latency in seconds, by model, or model and image size, such as
            `"google/nano-banana-2@4k"`. Its resolution is that of the polls.
        latency_models: Learned latency models, for `PollPolicy(latency_models=...)` of a later client. Plain
            numbers, valid in JSON.
        reasons: Number of final tasks without an image, by `ReasonKind`.
        mismatches: Number of saved images that are not as requested, by `MismatchKind`. An image may count twice.
    """

    tracked: int
    in_flight: int
    overdue_tasks: int
    overdue_s: float
    pressure: float
    polls: int
    slow_tasks: int
    wakeups: int
    median_latency_s: Mapping[str, float]
    latency_models: Mapping[str, tuple[float, ...]] = attrs.field(repr=False)
    reasons: Mapping[str, int] = attrs.field(factory=dict[str, int])
    mismatches: Mapping[str, int] = attrs.field(factory=dict[str, int])
