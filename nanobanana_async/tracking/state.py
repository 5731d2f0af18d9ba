"""What the tracker keeps: one entry per task, one watch per waiter, and the figures it shows of itself."""

import copy
import math
from collections.abc import Mapping
from typing import Final, Generic, TypeVar

import attrs

from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.errors import NanoBananaError, TaskNotFound
from nanobanana_async.models import Task

T = TypeVar("T")

CONFIRM_INTERVAL_S: Final = 10.0
"""News is only a hint: anybody may send it. So often, and not oftener, it buys a query."""


@attrs.frozen(kw_only=True)
class SubmitInfo:
    """What is known of a task before it is first looked at."""

    submitted_at_s: float | None = None
    """When this client's submit was accepted, on the event loop's clock; None when it was submitted elsewhere."""
    model: str | None = None
    has_callback: bool = False
    """Whether the service is to call back when it ends."""


@attrs.define(eq=False, weakref_slot=False)
class TrackedTask:
    """One watched task. There may be a million of them, so it holds no container that it need not."""

    task_id: str
    model: str | None
    submitted_at_s: float
    """When it was submitted; a guess when that was elsewhere."""
    submitted_here: bool
    """Whether this client submitted it, so that its age is known."""
    has_callback: bool = False
    """Whether news of its end is expected."""
    waiters: "Waiter | None" = None
    """Who waits: the head of a chain, for neither joining nor leaving may cost more where many do."""
    due_s: float = math.inf
    """When it is next looked at; infinity while a look is under way."""
    demand_per_s: float = 0.0
    """Looks per second it would like to have."""
    later_s: float = -math.inf
    """When it would be due if somebody came back for it."""
    polls: int = 0
    poll_in_flight: bool = False
    """Whether a look is under way."""
    consecutive_errors: int = 0
    """Looks in a row that brought no answer."""
    last_poll_s: float = -math.inf
    """When the last look left."""
    confirm_at_s: float = -math.inf
    """When the last look that news has bought was, or is to be."""
    last_unfinished_age_s: float = 0.0
    """The age at which it was last seen unfinished."""
    snapshot: Task | None = None
    """The last snapshot, never older in status than the one before."""
    error: NanoBananaError | None = None
    """What ended the watching, for all who wait."""
    last_error: str = ""
    """What the last look met instead of an answer, in words: an error would keep its reply alive."""
    last_found_s: float = -math.inf
    """When it was last seen at the service."""
    missing_since_s: float = math.inf
    """Since when it has answered 404 although it should be there; infinity while it has not."""
    missing_polls: int = 0

    @property
    def is_final(self) -> bool:
        """Whether its last snapshot will never change again."""
        return self.snapshot is not None and self.snapshot.is_final

    def set_submit_info(self, submit_info: "SubmitInfo") -> None:
        """Learn where it comes from, if nobody has said so before."""
        if submit_info.submitted_at_s is not None and not self.submitted_here:
            self.submitted_here, self.submitted_at_s, self.model = True, submit_info.submitted_at_s, submit_info.model
            self.has_callback = submit_info.has_callback

    def add_waiter(self, waiter: "Waiter") -> None:
        """Let one more wait."""
        waiter.after = self.waiters
        if self.waiters is not None:
            self.waiters.before = waiter
        self.waiters = waiter

    def remove_waiter(self, waiter: "Waiter") -> None:
        """Let it go; with the last one goes what only they wanted, however large."""
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
        """Wake all who wait."""
        waiter = self.waiters
        while waiter is not None:
            waiter.wake()
            waiter = waiter.after

    def request_confirmation(self, now_s: float) -> bool:
        """Grant news a look at `confirm_s`; False when the last one it bought is too recent and one is planned."""
        if self.confirm_at_s > now_s:
            return False
        self.confirm_at_s = max(now_s, self.confirm_at_s + CONFIRM_INTERVAL_S)
        return True


@attrs.define(eq=False, weakref_slot=False)
class Waiter:
    """One who is interested in a task. Costs nothing but itself until `bell` is waited for."""

    task: TrackedTask
    due_s: float = math.inf
    """When its patience ends."""
    event: OneShotEvent | None = None
    before: "Waiter | None" = None
    after: "Waiter | None" = None

    def wake(self) -> None:
        """Wake it."""
        if self.event is not None:
            self.event.set()


NOBODYS: Final = TrackedTask("", None, 0.0, submitted_here=False)
"""What the watch of somebody who has left is about."""


def with_task_id(exc: NanoBananaError, task_id: str) -> NanoBananaError:
    """Return *exc* as one that is about *task_id*."""
    mine = copy.copy(exc)
    mine.args = (str(exc).replace(exc.task_id or task_id, task_id),)
    mine.task_id = task_id
    return mine


def lost_task_error(tracked: TrackedTask, exc: TaskNotFound) -> TaskNotFound:
    """Return what those get who wait for a task that the service has lost."""
    last = "it never showed" if tracked.snapshot is None else f"it was last {tracked.snapshot.status}"
    was = "was accepted and may have been charged" if tracked.submitted_here else "was there"
    what = f"task {tracked.task_id} {was}, and the service no longer knows it ({last}): {exc}"
    return TaskNotFound(what, status=exc.status, code=exc.code, task_id=tracked.task_id)


class FifoCache(Generic[T]):
    """The last so many things, by task id."""

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._items: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, task_id: str, value: T) -> None:
        """Keep *thing*; what was kept first goes when there are too many. A thing that is there stays."""
        if task_id in self._items:
            return
        if len(self._items) >= self._maxsize:
            del self._items[next(iter(self._items))]
        self._items[task_id] = value

    def get(self, task_id: str) -> T | None:
        """Return what is kept for *task_id*; None when nothing is."""
        return self._items.get(task_id)

    def pop(self, task_id: str) -> T | None:
        """Take it out."""
        return self._items.pop(task_id, None)


class TaskCache:
    """What a tracker keeps of tasks that nobody waits for just now; all of it bounded."""

    def __init__(self) -> None:
        self.finished: Final[FifoCache[Task]] = FifoCache(256)
        """Finished ones, for those who ask late. Ones that carry their picture inline are not kept."""
        self.suspended: Final[FifoCache[TrackedTask]] = FifoCache(256)
        """Unfinished ones: who comes back goes on where it was."""
        self.submits: Final[FifoCache[SubmitInfo]] = FifoCache(4096)
        """Own submits, for handles that are made again from an id: a web app's second request."""
        self.heard: Final[FifoCache[bool]] = FifoCache(4096)
        """Own submits of which news came while nobody waited for them."""

    def add_finished(self, task: Task) -> None:
        """Keep how a task ended."""
        if all(image.data is None for image in task.images):
            self.finished.add(task.task_id, task)


@attrs.frozen(kw_only=True)
class TrackerStatistics:
    """How a client's tracker stands, at one moment."""

    tracked: int
    """Tasks somebody waits for that are not final yet."""
    in_flight: int
    """Looks sent and not answered; never above `Limits.max_polls`."""
    overdue_tasks: int
    """Tasks whose look should have left by now: they queue for a slot or for the pacer."""
    overdue_s: float
    """How late the most delayed of them is, in seconds; 0.0 when none is."""
    pressure: float
    """How many times more looks are wanted than `Limits.requests_per_s` leaves room for; at least 1.0."""
    polls: int
    """Looks taken since the client was made."""
    wakeups: int
    """Times the scheduler woke up since then."""
    median_latency_s: Mapping[str, float]
    """Seconds in which half of the pictures are done, by model: as learned, and no finer than the looks were."""
    latency_models: Mapping[str, tuple[float, ...]] = attrs.field(repr=False)
    """All that was learned, by model, for `PollPolicy(curves=...)` of a later client. Plain numbers: JSON will do."""
