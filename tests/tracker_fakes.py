"""A tracker over a service that answers as it is told."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import anyio
import attrs

from nanobanana_async import PollPolicy, Task, TaskStatus
from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async.tracking.schedule import PollSchedule
from nanobanana_async.tracking.tracker import PollSource, TaskTracker


def task(status: TaskStatus | str, task_id: str = "ta-1") -> Task:
    """Return a snapshot."""
    return Task(task_id=task_id, status=TaskStatus(status))


@attrs.define
class FakePollSource:
    """A source of snapshots: what it answers follows from the id and the time since it began."""

    answer: Callable[[str, float], Task | Exception]
    slots: int = 64
    delay_s: float = 0.01
    polls: list[tuple[float, str]] = attrs.field(factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    polls_per_s: float = 1e6
    _semaphore: anyio.Semaphore = attrs.field(init=False)
    _start_s: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._semaphore = anyio.Semaphore(self.slots)
        self._start_s = anyio.current_time()

    async def acquire_poll_slot(self) -> None:
        """Wait for a slot."""
        await self._semaphore.acquire()

    def release_poll_slot(self) -> None:
        """Give it back."""
        self._semaphore.release()

    async def poll(self, task_id: str) -> Task:
        """Answer after a while."""
        self.polls.append((anyio.current_time() - self._start_s, task_id))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await anyio.sleep(self.delay_s)
            answer = self.answer(task_id, anyio.current_time() - self._start_s)
        finally:
            self.in_flight -= 1
            self._semaphore.release()
        if isinstance(answer, Exception):
            raise answer
        return answer


def every(interval_s: float = 1.0, **settings: float) -> PollPolicy:
    """Return a policy of even looks, or whatever else *settings* make of it."""
    even = {"first_poll_s": interval_s, "initial_s": interval_s, "multiplier": 1.0, "max_s": interval_s, "jitter": 0.0}
    return PollPolicy.backoff(**{**even, **settings})


@asynccontextmanager
async def tracking(service: PollSource, policy: PollPolicy | None = None) -> AsyncIterator[TaskTracker]:
    """Run a tracker over *service*, by default with a look a second."""
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
    """Return an answer that is in progress for so long, and then a success."""
    return lambda task_id, now_s: task("success" if now_s >= seconds else "in_progress", task_id)
