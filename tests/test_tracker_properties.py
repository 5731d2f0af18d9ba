"""The tracker's invariants, checked at every event, for any arrivals, latencies and errors."""

import math
from collections.abc import Iterator
from functools import partial
from random import Random

import anyio
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanobanana_async import (
    PollPolicy,
    RateLimited,
    Task,
    TaskNotFound,
    TaskStatus,
    TaskTimeout,
    TransportError,
)
from nanobanana_async._concurrency.slots import Slot
from nanobanana_async.api.rate_limit import AdaptiveRateLimiter
from nanobanana_async.tracking.state import SubmitInfo
from nanobanana_async.tracking.tracker import TaskTracker
from tests.latency_samples import lognormal
from tests.tracker_fakes import FakePollSource, every, slot_pool, task, tracking

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

ORDER = [TaskStatus.PENDING, TaskStatus.SUBMITTED, TaskStatus.IN_PROGRESS, TaskStatus.SUCCESS]


@attrs.frozen
class Job:
    """One task and its waiter."""

    arrives_s: float
    latency_s: float
    timeout_s: float
    leaves_s: float
    """When the waiter is cancelled."""
    shares: bool
    """Whether it is the task of the job before."""


seconds = st.floats(0.0, 60.0, allow_nan=False)
jobs = st.lists(
    st.builds(Job, seconds, st.floats(0.1, 120.0), st.floats(0.0, 300.0), st.floats(1.0, 1000.0), st.booleans()),
    min_size=1,
    max_size=12,
)


@attrs.define
class CheckingSource(FakePollSource):
    """A poll source that checks the tracker at each event and fails at a seeded rate."""

    tracker: TaskTracker | None = None
    error_rate: float = 0.0
    rng: Random = attrs.field(factory=Random)
    under_way: set[str] = attrs.field(factory=set)

    async def poll(self, task_id: str) -> Task:
        """Return a snapshot, or fail."""
        assert task_id not in self.under_way, "two polls of one task at once"
        self.under_way.add(task_id)
        self.check()
        try:
            snapshot = await super().poll(task_id)
            self.check()
        finally:
            self.under_way.discard(task_id)
        if self.rng.random() < self.error_rate:
            raise self.rng.choice([TransportError("gone"), RateLimited("slow down"), TaskNotFound("not yet")])
        return snapshot

    def check(self) -> None:
        """Assert the invariants."""
        assert self.tracker is not None
        tracker = self.tracker
        assert self.in_flight <= self.slots
        assert tracker._in_flight <= self.slots
        assert all(tracked.waiters for tracked in tracker._tasks.values())
        planned = {entry.task_id for due_s, _, entry in tracker._poll_queue._heap if due_s == entry.due_s}
        begun = tracker._in_flight - len(self.under_way)
        assert len(set(tracker._tasks) - planned - self.under_way) <= begun, "tracked and never polled again"
        demand_per_s = math.fsum(entry.demand_per_s for entry in tracker._tasks.values())
        assert tracker._demand_per_s == pytest.approx(demand_per_s, abs=1e-6)


def truth(latencies_s: dict[str, tuple[float, float]]) -> "partial[Task]":
    """Return a function that gives the status of each task at each time."""

    def snapshot_at(task_id: str, now_s: float) -> Task:
        began_s, latency_s = latencies_s[task_id]
        share = min((now_s - began_s) / latency_s, 1.0)
        return task(ORDER[math.floor(share * 3)], task_id)

    return partial(snapshot_at)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
@settings(max_examples=25, deadline=None)
@given(jobs=jobs, slots=st.integers(1, 4), error_rate=st.sampled_from([0.0, 0.2, 0.6]), seed=st.integers(0, 99))
async def test_every_waiter_gets_the_truth_or_an_error_in_time(
    learned: bool,  # noqa: FBT001 - a parameter
    jobs: list[Job],
    slots: int,
    error_rate: float,
    seed: int,
) -> None:
    """No waiter is lost or woken twice, the bound holds, and statuses only go forward."""
    begun: dict[str, tuple[float, float]] = {}
    service = CheckingSource(truth(begun), slots=slots, delay_s=0.2, error_rate=error_rate, rng=Random(seed))
    start_s = anyio.current_time()
    ends: list[bool] = []

    async def one(number: int, job: Job) -> None:
        await anyio.sleep(job.arrives_s)
        shared = job.shares and number > 0 and f"ta-{number - 1}" in begun
        task_id = f"ta-{number - 1 if shared else number}"
        began_s, latency_s = begun.setdefault(task_id, (anyio.current_time() - start_s, job.latency_s))
        submit_info = SubmitInfo(submitted_at_s=start_s + began_s, kind="m")
        asked_s, seen = anyio.current_time(), [-1]
        with anyio.move_on_after(job.leaves_s) as scope:
            try:
                updates = tracker.updates(task_id, timeout_s=job.timeout_s, submit_info=submit_info)
                seen.extend([ORDER.index(snapshot.status) async for snapshot in updates])
                assert seen[-1] == 3
                assert anyio.current_time() - start_s >= began_s + latency_s - 1e-6
            except TaskTimeout:
                pass
        assert seen == sorted(set(seen))
        assert anyio.current_time() - asked_s <= min(job.timeout_s, job.leaves_s) + 1
        ends.append(scope.cancelled_caught)

    async with tracking(service, PollPolicy() if learned else every(2.0)) as tracker:
        service.tracker = tracker
        async with anyio.create_task_group() as group:
            for number, job in enumerate(jobs):
                group.start_soon(one, number, job)
        assert len(ends) == len(jobs)
        assert tracker.statistics().tracked == 0
        assert tracker._demand_per_s == 0


def arrivals(count: int, over_s: float) -> Iterator[tuple[float, float]]:
    """Yield evenly spaced arrival times and latencies."""
    rng, draw = Random(7), lognormal(20, 0.5)
    for number in range(count):
        yield number * over_s / count, draw(rng)


@pytest.mark.slow
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_hundred_thousand_tasks_in_an_hour_are_all_noticed() -> None:
    """28 new tasks per second are tracked with 34 polls per second."""
    began: dict[str, tuple[float, float]] = {}
    late_s: list[float] = []
    start_s, rate, longest_s = anyio.current_time(), 34.0, 0.0

    class RateLimitedSource:
        """A poll source with a rate limiter."""

        polls_per_s = rate

        def __init__(self) -> None:
            self.limiter, self.pool = AdaptiveRateLimiter(rate, burst=20), slot_pool(10_000)

        async def acquire_poll_slot(self) -> Slot:
            await self.limiter.acquire()
            return await self.pool.acquire()

        async def poll(self, task_id: str) -> Task:
            began_s, latency_s = began[task_id]
            over_s = anyio.current_time() - start_s - began_s - latency_s
            if over_s >= 0:
                late_s.append(over_s)
            return Task(task_id=task_id, status=TaskStatus.SUCCESS if over_s >= 0 else TaskStatus.IN_PROGRESS)

    async with tracking(RateLimitedSource(), PollPolicy()) as tracker:
        for number, (arrives_s, latency_s) in enumerate(arrivals(100_000, 3600.0)):
            if start_s + arrives_s > anyio.current_time() + 0.5:
                await anyio.sleep_until(start_s + arrives_s)
                longest_s = max(longest_s, tracker.statistics().overdue_s) if number % 1000 == 0 else longest_s
            now_s = anyio.current_time()
            began[f"ta-{number}"] = (now_s - start_s, latency_s)
            tracker.track(f"ta-{number}", SubmitInfo(submitted_at_s=now_s, kind="m"))
        await anyio.sleep(300)
        statistics = tracker.statistics()
    assert len(late_s) == 100_000
    assert statistics.tracked == 0
    assert statistics.median_latency_s["m"] == pytest.approx(20, rel=0.25)  # from little more than one poll of each
    assert statistics.polls <= rate * 3900
    assert longest_s < 20
