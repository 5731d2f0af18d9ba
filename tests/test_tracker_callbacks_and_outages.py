"""News, pressure, outages, stalls: the tracker keeps its promises when things are not as usual."""

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
    TaskNotFound,
    TaskStatus,
    TaskTimeout,
    WireRequest,
    WireResponse,
)
from nanobanana_async.tracking.state import SubmitInfo
from tests.fakes import ScriptedTransport, accepted, finished, rejected, response, script, state
from tests.tracker_fakes import FakePollSource, every, finished_after, task, tracking
from tests.virtual_time import jump

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def ours() -> SubmitInfo:
    """Return the origin of a task that this client has just submitted."""
    return SubmitInfo(submitted_at_s=anyio.current_time(), model="m")


# --- news -----------------------------------------------------------------------------------------------------------


async def test_news_is_followed_by_a_look_at_once() -> None:
    """A callback says that it is done long before the schedule would have asked."""
    service = FakePollSource(finished_after(5))
    async with tracking(service, every(100.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=ours()))
        await anyio.sleep(6)
        tracker.notify("ta-1")
    assert [round(time_s) for time_s, _ in service.polls] == [6]


async def test_a_flood_of_news_buys_one_look_in_ten_seconds() -> None:
    """Anybody may send it."""
    service = FakePollSource(finished_after(1e9))
    async with tracking(service, every(1000.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=ours()))
        for _ in range(10_000):
            await anyio.sleep(0.01)
            tracker.notify("ta-1")
        group.cancel_scope.cancel()
    times_s = [time_s for time_s, _ in service.polls]
    assert len(times_s) == 10
    assert all(later - earlier >= 10 - 1e-6 for earlier, later in pairwise(times_s))


async def test_true_news_after_forged_news_is_followed_within_ten_seconds() -> None:
    """It is not thrown away with the rest."""
    service = FakePollSource(finished_after(8))
    async with tracking(service, every(1000.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=ours()))
        for second in (5.0, 4.0):
            await anyio.sleep(second)
            tracker.notify("ta-1")
    assert [round(time_s) for time_s, _ in service.polls] == [5, 15]


async def test_news_at_ids_that_nobody_waits_for_costs_nothing() -> None:
    """Neither a look nor memory."""
    service = FakePollSource(finished_after(5))
    async with tracking(service) as tracker:
        for number in range(1000):
            tracker.notify(f"ta-{number}")
        await anyio.sleep(100)
        assert not tracker._tasks
        assert not tracker._poll_queue
    assert not service.polls


async def test_news_that_comes_while_a_look_is_under_way_is_followed_by_another() -> None:
    """The answer on its way may be older than the news."""
    service = FakePollSource(finished_after(6.2), delay_s=2.0)
    async with tracking(service, every(1000.0, first_poll_s=5.0)) as tracker, anyio.create_task_group() as group:
        group.start_soon(partial(tracker.wait, "ta-1", timeout_s=600, submit_info=ours()))
        service.answer = lambda task_id, now_s: task("success" if now_s > 8 else "in_progress", task_id)
        await anyio.sleep(6.5)
        tracker.notify("ta-1")
    assert [round(time_s) for time_s, _ in service.polls] == [5, 7]


# --- late comers ------------------------------------------------------------------------------------------------------


async def test_who_asks_after_the_end_is_answered_without_a_look() -> None:
    """Finished tasks are remembered for a while."""
    service = FakePollSource(finished_after(0))
    async with tracking(service) as tracker:
        first = await tracker.wait("ta-1", timeout_s=60)
        assert await tracker.wait("ta-1", timeout_s=60) is first
        assert [seen async for seen in tracker.updates("ta-1", timeout_s=60)] == [first]
    assert len(service.polls) == 1


async def test_what_is_remembered_is_bounded_and_holds_no_pictures() -> None:
    """A few hundred finished tasks, the latest ones, and none whose picture came inline."""
    image = GeneratedImage(data=b"x" * 1000)
    heavy = attrs.evolve(task("success", "ta-heavy"), images=(image,))
    service = FakePollSource(lambda task_id, _: heavy if task_id == "ta-heavy" else task("success", task_id))
    async with tracking(service) as tracker:
        await tracker.wait("ta-heavy", timeout_s=60)
        for number in range(1100):
            await tracker.wait(f"ta-{number}", timeout_s=60)
        assert len(tracker.cache.finished) == 256
        assert tracker.cache.finished.get("ta-1099")
        assert tracker.cache.finished.get("ta-heavy") is None


# --- patience ---------------------------------------------------------------------------------------------------------


async def test_waits_end_in_time_while_no_request_can_leave() -> None:
    """The service asked for quiet, or all slots hang: patience does not queue behind requests."""
    service = FakePollSource(finished_after(0), slots=1)
    await service.acquire_poll_slot()  # and never gives it back
    async with tracking(service) as tracker:
        start_s = anyio.current_time()
        with pytest.raises(TaskTimeout, match="without a status"):
            await tracker.wait("ta-1", timeout_s=30)
        assert anyio.current_time() - start_s == pytest.approx(30, abs=1)


async def test_everybody_has_a_patience_of_their_own() -> None:
    """One timer serves them all, in the order of their deadlines."""
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


async def test_a_patience_without_end_is_allowed() -> None:
    """It is the caller's."""
    async with tracking(FakePollSource(finished_after(3))) as tracker:
        assert (await tracker.wait("ta-1", timeout_s=math.inf)).is_final


# --- strange answers --------------------------------------------------------------------------------------------------


async def test_an_unknown_status_is_looked_at_slowly_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """The service has learned a new word; the task counts as running."""
    service = FakePollSource(lambda task_id, now_s: task("success" if now_s > 100 else "unrecognized", task_id))
    async with tracking(service, PollPolicy()) as tracker, anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600))
    assert caplog.text.count("unrecognized status") == 1
    assert max(Counter(task_id for _, task_id in service.polls).values()) <= 1 + 100 / (15 * 0.9) + 1


async def test_a_lost_task_is_said_to_have_been_accepted() -> None:
    """It was paid for, and whoever reads the error must not take it for a typing error."""
    async with tracking(FakePollSource(lambda *_: TaskNotFound("task not found", task_id="ta-1"))) as tracker:
        with pytest.raises(TaskNotFound, match="accepted and may have been charged") as caught:
            await tracker.wait("ta-1", timeout_s=3600, submit_info=ours())
    assert caught.value.task_id == "ta-1"


async def test_going_backwards_is_noted_and_not_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    """For whoever looks for the reason."""
    words = iter(["in_progress", "pending", "success"])
    with caplog.at_level(logging.DEBUG, "nanobanana_async"):
        async with tracking(FakePollSource(lambda *_: task(next(words)))) as tracker:
            seen = [snapshot.status async for snapshot in tracker.updates("ta-1", timeout_s=60)]
    assert seen == [TaskStatus.IN_PROGRESS, TaskStatus.SUCCESS]
    assert "went from in_progress to pending" in caplog.text


# --- pressure ---------------------------------------------------------------------------------------------------------


@attrs.define
class Paced(FakePollSource):
    """A service that is asked so many times per second and not more often."""

    next_s: float = -math.inf

    async def acquire_poll_slot(self) -> None:
        """Wait for a slot and for the pacer."""
        await self._semaphore.acquire()
        self.next_s = max(anyio.current_time(), self.next_s + 1 / self.polls_per_s)
        await anyio.sleep_until(self.next_s)


async def test_when_more_looks_are_wanted_than_may_be_sent_everybody_is_looked_at_less() -> None:
    """Pauses grow until the looks fit, instead of a queue that grows."""
    service = Paced(finished_after(1e9), polls_per_s=20.0)
    policy = PollPolicy(max_interval_s=60.0)
    async with tracking(service, policy) as tracker:
        for number in range(400):
            tracker.track(f"ta-{number}", ours())
            await anyio.sleep(0.02)
        await anyio.sleep(40)
        statistics = tracker.statistics()
    assert statistics.pressure > 2
    assert statistics.overdue_s < 3
    assert len([time_s for time_s, _ in service.polls if time_s > 20]) <= 30 * 20


async def test_nobody_waits_longer_than_the_longest_pause_and_one_round() -> None:
    """However great the pressure."""
    service = Paced(finished_after(1e9), polls_per_s=10.0)
    async with tracking(service, PollPolicy()) as tracker:
        for number in range(500):
            tracker.track(f"ta-{number}", ours())
        await anyio.sleep(600)
    times_s: dict[str, list[float]] = {}
    for time_s, task_id in service.polls:
        times_s.setdefault(task_id, []).append(time_s)
    assert len(times_s) == 500
    longest_s = max(later - earlier for times in times_s.values() for earlier, later in pairwise(times))
    assert longest_s <= 15 * 1.1 + 500 / 10 + 1


async def test_statistics_tell_how_things_stand() -> None:
    """A frozen snapshot with units."""
    service = FakePollSource(finished_after(30))
    async with tracking(service, PollPolicy()) as tracker, anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600, submit_info=ours()))
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
    """Nobody here knows when they were submitted."""
    async with tracking(FakePollSource(finished_after(30)), PollPolicy()) as tracker:
        await tracker.wait("ta-foreign", timeout_s=600)
        assert not tracker.statistics().median_latency_s


# --- outages and stalls -----------------------------------------------------------------------------------------------


def service(finished_s: float, error_rate: object = None, until_s: float = 0.0) -> ScriptedTransport:
    """Return a transport: submits are accepted at once; queries meet *trouble* until then, and later tell the truth."""
    numbers = iter(range(10_000))
    start_s = anyio.current_time()

    async def answer(request: WireRequest) -> WireResponse:
        if request.method == "POST":
            return accepted(f"ta-{next(numbers)}")
        now_s = anyio.current_time() - start_s
        if isinstance(error_rate, WireResponse) and 2 < now_s < until_s:
            return error_rate
        task_id = request.url.rpartition("=")[2]
        return finished(task_id) if now_s >= finished_s else state("in_progress", task_id)

    return script(answer)


async def generate_all(client: NanoBananaClient, count: int) -> list[Task]:
    """Make *count* pictures at once."""
    made: list[Task] = []

    async def one() -> None:
        made.append(await client.generate("a fox", timeout_s=3600))

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
    return made


def busiest_second(times_s: list[float], since_s: float = -math.inf) -> int:
    """Return the most requests that left within one second."""
    times_s = sorted(time_s for time_s in times_s if time_s >= since_s)
    most, first = 0, 0
    for last, time_s in enumerate(times_s):
        while time_s - times_s[first] > 1:
            first += 1
        most = max(most, last - first + 1)
    return most


@pytest.mark.parametrize(
    "error_rate", [response(502, body=b"<html>Bad gateway</html>"), rejected(429, retry_after="2")], ids=["502", "429"]
)
async def test_in_an_outage_everything_backs_off_together_and_comes_back_without_a_herd(
    error_rate: WireResponse,
) -> None:
    """A thousand tasks, ten minutes without a useful answer: a trickle of requests, and then no flood."""
    transport = service(300.0, error_rate, until_s=600.0)
    start_s = anyio.current_time()
    async with NanoBananaClient("dk-test", transport=transport) as client:
        assert len(await generate_all(client, 1000)) == 1000
    during = [time_s for time_s in transport.times_s if start_s + 60 < time_s < start_s + 600]
    assert 5 < len(during) < 540 * 2
    assert busiest_second(during) <= 8
    assert busiest_second(transport.times_s, start_s + 600) <= 200
    assert busiest_second(transport.times_s, start_s + 600) < busiest_second(transport.times_s)


async def test_after_the_loop_stood_still_no_more_than_a_burst_leaves_at_once() -> None:
    """Five minutes of suspend: everything is overdue, and goes out at the rate all the same."""
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
    """Trouble is what comes three times in a row, whichever tasks it is about."""

    def answer(task_id: str, now_s: float) -> Task | Exception:
        bad = ServiceUnavailable("boom (HTTP 500)", status=500)
        return bad if task_id == "ta-bad" else finished_after(30)(task_id, now_s)

    service = FakePollSource(answer)
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
