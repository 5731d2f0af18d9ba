"""A tracker over a scripted poll source."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import anyio
import attrs

from nanobanana_async import PollPolicy, Task, TaskStatus
from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.slots import Slot, SlotPool
from nanobanana_async.tracking.schedule import PollSchedule
from nanobanana_async.tracking.state import PollSource
from nanobanana_async.tracking.tracker import TaskTracker


def task(status: TaskStatus | str, task_id: str = "ta-1") -> Task:
    """Return a snapshot."""
    return Task(task_id=task_id, status=TaskStatus(status))


@attrs.define
class FakePollSource:
    """A poll source whose snapshots follow from the id and the time since its start."""

    snapshot_at: Callable[[str, float], Task | Exception]
    slots: int = 64
    delay_s: float = 0.01
    polls: list[tuple[float, str]] = attrs.field(factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    polls_per_s: float = 1e6
    _pool: SlotPool = attrs.field(init=False)
    start_s: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pool = slot_pool(self.slots)
        self.start_s = anyio.current_time()

    async def acquire_poll_slot(self) -> Slot:
        """Wait for a slot."""
        return await self._pool.acquire()

    async def poll(self, task_id: str) -> Task:
        """Return a snapshot after a delay."""
        self.polls.append((anyio.current_time() - self.start_s, task_id))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await anyio.sleep(self.delay_s)
            snapshot = self.snapshot_at(task_id, anyio.current_time() - self.start_s)
        finally:
            self.in_flight -= 1
        if isinstance(snapshot, Exception):
            raise snapshot
        return snapshot


def slot_pool(size: int) -> SlotPool:
    """Return a pool for callers without deadlines, which needs no timer."""

    def no_timer(_: object) -> None:
        raise AssertionError("expected no deadline")

    return SlotPool(size, no_timer)


def every(interval_s: float = 1.0, **settings: float) -> PollPolicy:
    """Return a policy with even intervals, changed by *settings*."""
    even = {"first_poll_s": interval_s, "initial_s": interval_s, "multiplier": 1.0, "max_s": interval_s, "jitter": 0.0}
    return PollPolicy.backoff(**{**even, **settings})


@asynccontextmanager
async def tracking(service: PollSource, policy: PollPolicy | None = None) -> AsyncIterator[TaskTracker]:
    """Run a tracker over *service*, by default with one poll per second."""
    background = BackgroundTaskGroup()
    await background.ensure_started()
    tracker = TaskTracker(service, PollSchedule(policy or every(), Random(1)), background)
    try:
        yield tracker
    finally:
        tracker.close()
        with anyio.CancelScope(shield=True):
            await background.aclose(drain_s=1)


def finished_after(seconds: float) -> Callable[[str, float], Task]:
    """Return a function that is in_progress for a time and then success."""
    return lambda task_id, now_s: task("success" if now_s >= seconds else "in_progress", task_id)
