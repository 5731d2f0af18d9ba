"""The tracker with callbacks, under pressure, in outages and after stalls."""

import logging
import math
from collections import Counter
from functools import partial
from itertools import pairwise

import anyio
import attrs
import pytest

from nanobanana_async import (
    GeneratedImage,
    NanoBananaClient,
    PollPolicy,
    ServiceUnavailable,
    Task,
    TaskLost,
    TaskNotFound,
    TaskStatus,
    TaskTimeout,
    WireRequest,
    WireResponse,
)
from nanobanana_async._concurrency.slots import Slot
from nanobanana_async.tracking.state import SubmitInfo
from tests.fakes import ScriptedTransport, accepted, finished, rejected, response, script, state
from tests.tracker_fakes import FakePollSource, every, finished_after, task, tracking
from tests.virtual_time import jump

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def submitted_now() -> SubmitInfo:
    """Return the info of a task that this client has just submitted."""
    return SubmitInfo(submitted_at_s=anyio.current_time(), kind="m")


# --- callbacks ------------------------------------------------------------------------------------------------------


async def test_a_callback_triggers_a_poll_at_once() -> None:
    """The poll comes long before the schedule would send it."""
    service = FakePollSource(finished_after(5))
    async with tracking(service, every(100.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=submitted_now()))
        await anyio.sleep(6)
        tracker.notify("ta-1")
    assert [round(time_s) for time_s, _ in service.polls] == [6]


async def test_a_flood_of_callbacks_triggers_one_poll_in_ten_seconds() -> None:
    """Anyone may send callbacks."""
    service = FakePollSource(finished_after(1e9))
    async with tracking(service, every(1000.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=submitted_now()))
        for _ in range(10_000):
            await anyio.sleep(0.01)
            tracker.notify("ta-1")
        group.cancel_scope.cancel()
    times_s = [time_s for time_s, _ in service.polls]
    assert len(times_s) == 10
    assert all(later - earlier >= 10 - 1e-6 for earlier, later in pairwise(times_s))


async def test_a_true_callback_after_forged_ones_is_polled_within_ten_seconds() -> None:
    """It is not dropped with the forged ones."""
    service = FakePollSource(finished_after(8))
    async with tracking(service, every(1000.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=submitted_now()))
        for second in (5.0, 4.0):
            await anyio.sleep(second)
            tracker.notify("ta-1")
    assert [round(time_s) for time_s, _ in service.polls] == [5, 15]


async def test_callbacks_for_ids_without_waiters_cost_nothing() -> None:
    """They cause no polls and use no memory."""
    service = FakePollSource(finished_after(5))
    async with tracking(service) as tracker:
        for number in range(1000):
            tracker.notify(f"ta-{number}")
        await anyio.sleep(100)
        assert tracker.statistics().tracked == 0
    assert not service.polls


async def test_a_callback_during_a_poll_triggers_another_poll() -> None:
    """The response in flight may be older than the callback."""
    service = FakePollSource(finished_after(6.2), delay_s=2.0)
    async with tracking(service, every(1000.0, first_poll_s=5.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=submitted_now()))
        service.snapshot_at = lambda task_id, now_s: task("success" if now_s > 8 else "in_progress", task_id)
        await anyio.sleep(6.5)
        tracker.notify("ta-1")
    assert [round(time_s) for time_s, _ in service.polls] == [5, 7]


# --- cache ------------------------------------------------------------------------------------------------------------


async def test_a_wait_after_the_end_needs_no_poll() -> None:
    """Finished tasks are cached for a while."""
    service = FakePollSource(finished_after(0))
    async with tracking(service) as tracker:
        first = await tracker.wait("ta-1", timeout_s=60)
        assert await tracker.wait("ta-1", timeout_s=60) is first
        assert [seen async for seen in tracker.updates("ta-1", timeout_s=60)] == [first]
    assert len(service.polls) == 1


async def test_the_cache_is_bounded_and_holds_no_images() -> None:
    """It keeps the latest few hundred tasks, without inline images."""
    image = GeneratedImage(data=b"x" * 1000)
    heavy = attrs.evolve(task("success", "ta-heavy"), images=(image,))
    service = FakePollSource(lambda task_id, _: heavy if task_id == "ta-heavy" else task("success", task_id))
    async with tracking(service) as tracker:
        await tracker.wait("ta-heavy", timeout_s=60)
        for number in range(1100):
            await tracker.wait(f"ta-{number}", timeout_s=60)
        assert len(tracker.cache.tasks) == 1024
        assert tracker.cache.finished("ta-1099")
        assert tracker.cache.finished("ta-heavy") is None


# --- deadlines --------------------------------------------------------------------------------------------------------


async def test_waits_end_in_time_while_no_request_can_be_sent() -> None:
    """A deadline does not wait for the rate limiter or for a slot."""
    service = FakePollSource(finished_after(0), slots=1)
    await service.acquire_poll_slot()  # and never gives it back
    async with tracking(service) as tracker:
        start_s = anyio.current_time()
        with pytest.raises(TaskTimeout, match="without a status"):
            await tracker.wait("ta-1", timeout_s=30)
        assert anyio.current_time() - start_s == pytest.approx(30, abs=1)


async def test_each_waiter_has_its_own_deadline() -> None:
    """One timer serves all waiters in the order of their deadlines."""
    ends_s: dict[float, float] = {}

    async def one(timeout_s: float) -> None:
        with pytest.raises(TaskTimeout):
            await tracker.wait("ta-1", timeout_s=timeout_s)
        ends_s[timeout_s] = anyio.current_time() - start_s

    async with tracking(FakePollSource(finished_after(1e9))) as tracker, anyio.create_task_group() as group:
        start_s = anyio.current_time()
        for timeout_s in (0.0, 50.0, 7.0, 0.5, 20.0, 7.5):
            group.start_soon(one, timeout_s)
    assert all(timeout_s <= end_s <= timeout_s + 1 for timeout_s, end_s in ends_s.items())


async def test_an_infinite_timeout_is_allowed() -> None:
    """The caller decides."""
    async with tracking(FakePollSource(finished_after(3))) as tracker:
        assert (await tracker.wait("ta-1", timeout_s=math.inf)).is_final


# --- odd statuses -----------------------------------------------------------------------------------------------------


async def test_an_unrecognized_status_is_polled_slowly_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The task is treated as running."""
    service = FakePollSource(lambda task_id, now_s: task("success" if now_s > 100 else "unrecognized", task_id))
    async with tracking(service, PollPolicy()) as tracker, anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600))
    assert caplog.text.count("unrecognized status") == 1
    assert max(Counter(task_id for _, task_id in service.polls).values()) <= 1 + 100 / (15 * 0.9) + 1


async def test_the_error_of_a_lost_task_says_that_it_was_accepted() -> None:
    """The error must not look like a mistyped id, because the task was charged."""
    async with tracking(FakePollSource(lambda *_: TaskNotFound("task not found", task_id="ta-1"))) as tracker:
        with pytest.raises(TaskLost, match="accepted and may have been charged") as caught:
            await tracker.wait("ta-1", timeout_s=3600, submit_info=submitted_now())
    assert caught.value.task_id == "ta-1"


async def test_a_status_that_goes_backwards_is_logged_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """The log helps to find the cause."""
    words = iter(["in_progress", "pending", "success"])
    with caplog.at_level(logging.DEBUG, "nanobanana_async"):
        async with tracking(FakePollSource(lambda *_: task(next(words)))) as tracker:
            seen = [snapshot.status async for snapshot in tracker.updates("ta-1", timeout_s=60)]
    assert seen == [TaskStatus.IN_PROGRESS, TaskStatus.SUCCESS]
    assert "went from in_progress to pending" in caplog.text


# --- pressure ---------------------------------------------------------------------------------------------------------


@attrs.define
class RateLimitedSource(FakePollSource):
    """A poll source with a rate limit."""

    next_s: float = -math.inf

    async def acquire_poll_slot(self) -> Slot:
        """Wait for a slot and for the rate."""
        slot = await super().acquire_poll_slot()
        self.next_s = max(anyio.current_time(), self.next_s + 1 / self.polls_per_s)
        await anyio.sleep_until(self.next_s)
        return slot


async def test_under_pressure_all_tasks_are_polled_less() -> None:
    """Intervals grow until the polls fit the rate, and no queue builds up."""
    service = RateLimitedSource(finished_after(1e9), polls_per_s=20.0)
    policy = PollPolicy(max_interval_s=60.0)
    async with tracking(service, policy) as tracker:
        for number in range(400):
            tracker.track(f"ta-{number}", submitted_now())
            await anyio.sleep(0.02)
        await anyio.sleep(40)
        statistics = tracker.statistics()
    assert statistics.pressure > 2
    assert statistics.overdue_s < 3
    assert len([time_s for time_s, _ in service.polls if time_s > 20]) <= 30 * 20


async def test_no_task_waits_longer_than_the_maximum_interval_and_one_round() -> None:
    """This holds under any pressure."""
    service = RateLimitedSource(finished_after(1e9), polls_per_s=10.0)
    async with tracking(service, PollPolicy()) as tracker:
        for number in range(200):
            tracker.track(f"ta-{number}", submitted_now())
        await anyio.sleep(300)
    times_s: dict[str, list[float]] = {}
    for time_s, task_id in service.polls:
        times_s.setdefault(task_id, []).append(time_s)
    assert len(times_s) == 200
    longest_s = max(later - earlier for times in times_s.values() for earlier, later in pairwise(times))
    assert longest_s <= 15 * 1.1 + 200 / 10 + 1


async def test_statistics_are_a_frozen_snapshot() -> None:
    """Each field has a unit."""
    service = FakePollSource(finished_after(30))
    async with tracking(service, PollPolicy()) as tracker, anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600, submit_info=submitted_now()))
        await anyio.sleep(20)
        half_way = tracker.statistics()
        assert (half_way.tracked, half_way.overdue_tasks, half_way.pressure) == (50, 0, 1.0)
        assert 0 < half_way.wakeups <= half_way.polls < 50 * 6
    after = tracker.statistics()
    assert (after.tracked, after.in_flight, after.overdue_tasks, after.overdue_s) == (0, 0, 0, 0.0)
    assert after.median_latency_s["m"] == pytest.approx(30, rel=0.2)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        after.tracked = 1  # type: ignore[misc]


async def test_tasks_of_unknown_age_teach_nothing() -> None:
    """The time of their submit is not known."""
    async with tracking(FakePollSource(finished_after(30)), PollPolicy()) as tracker:
        await tracker.wait("ta-foreign", timeout_s=600)
        assert not tracker.statistics().median_latency_s


# --- outages and stalls -----------------------------------------------------------------------------------------------


def service(finished_s: float, error_response: object = None, until_s: float = 0.0) -> ScriptedTransport:
    """Return a transport that accepts submits; queries fail at *error_response* until a time, and then succeed."""
    numbers = iter(range(10_000))
    start_s = anyio.current_time()

    async def respond(request: WireRequest) -> WireResponse:
        if request.method == "POST":
            return accepted(f"ta-{next(numbers)}")
        now_s = anyio.current_time() - start_s
        if isinstance(error_response, WireResponse) and 2 < now_s < until_s:
            return error_response
        task_id = request.url.rpartition("=")[2]
        return finished(task_id) if now_s >= finished_s else state("in_progress", task_id)

    return script(respond)


async def generate_all(client: NanoBananaClient, count: int) -> list[Task]:
    """Generate *count* images concurrently."""
    made: list[Task] = []

    async def one() -> None:
        made.append(await client.generate("a fox", timeout_s=3600))

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
    return made


def busiest_second(times_s: list[float], since_s: float = -math.inf) -> int:
    """Return the most requests sent within one second."""
    times_s = sorted(time_s for time_s in times_s if time_s >= since_s)
    most, first = 0, 0
    for last, time_s in enumerate(times_s):
        while time_s - times_s[first] > 1:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    "error_response",
    [response(502, body=b"<html>Bad gateway</html>"), rejected(429, retry_after="2")],
    ids=["502", "429"],
)
async def test_in_an_outage_all_polls_back_off_and_recover_without_a_burst(
    error_response: WireResponse,
) -> None:
    """A thousand tasks and ten minutes without a usable response cause few requests, and no burst after it."""
    transport = service(300.0, error_response, until_s=600.0)
    start_s = anyio.current_time()
    async with NanoBananaClient("dk-test", transport=transport) as client:
        assert len(await generate_all(client, 1000)) == 1000
    during = [time_s for time_s in transport.times_s if start_s + 60 < time_s < start_s + 600]
    assert 5 < len(during) < 540 * 2
    assert busiest_second(during) <= 8
    assert busiest_second(transport.times_s, start_s + 600) <= 200
    assert busiest_second(transport.times_s, start_s + 600) < busiest_second(transport.times_s)


@pytest.mark.slow
async def test_after_a_stall_no_more_than_a_burst_leaves_at_once() -> None:
    """After a suspend of five minutes everything is overdue, and leaves at the rate."""
    transport = service(1000.0)
    async with NanoBananaClient("dk-test", transport=transport) as client, anyio.create_task_group() as group:
        for _ in range(1000):
            group.start_soon(partial(client.generate, "a fox", timeout_s=3600))
        await anyio.sleep(30)
        jump(300.0)
        after_s = anyio.current_time()
        await anyio.sleep(20)
        group.cancel_scope.cancel()
    assert busiest_second(transport.times_s, after_s) <= 300 + 30


async def test_one_task_that_never_answers_does_not_slow_the_others() -> None:
    """An outage is three consecutive errors, of any tasks."""

    def snapshot_at(task_id: str, now_s: float) -> Task | Exception:
        bad = ServiceUnavailable("boom (HTTP 500)", status=500)
        return bad if task_id == "ta-bad" else finished_after(30)(task_id, now_s)

    service = FakePollSource(snapshot_at)
    async with tracking(service) as tracker, anyio.create_task_group() as group:
        bad = anyio.CancelScope()

        async def wait_for_the_bad_one() -> None:
            with bad:
                await tracker.wait("ta-bad", timeout_s=600)

        group.start_soon(wait_for_the_bad_one)
        async with anyio.create_task_group() as others:
            for number in range(20):
                others.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600))
        assert max(time_s for time_s, _ in service.polls) < 33
        bad.cancel()
