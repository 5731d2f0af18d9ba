"""One coroutine polls any number of tasks with a bounded number of polls in flight."""

from contextlib import aclosing
from functools import partial
from itertools import pairwise
from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import (
    AuthenticationError,
    InvalidRequest,
    NanoBananaError,
    PollPolicy,
    ProtocolError,
    RateLimited,
    ServiceUnavailable,
    Task,
    TaskLost,
    TaskNotFound,
    TaskStatus,
    TaskTimeout,
    TransportError,
)
from nanobanana_async.tracking.schedule import Lost, PollSchedule, Presence, latest_status
from nanobanana_async.tracking.state import SubmitInfo
from tests.tracker_fakes import FakePollSource, every, finished_after, task, tracking

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_wait_ends_with_the_final_snapshot() -> None:
    """The task is polled once per second until it is final."""
    service = FakePollSource(finished_after(3.5))
    async with tracking(service) as tracker:
        submit_info = SubmitInfo(submitted_at_s=anyio.current_time())
        assert (await tracker.wait("ta-1", timeout_s=60, submit_info=submit_info)).status is TaskStatus.SUCCESS
    assert [round(time_s) for time_s, _ in service.polls] == [1, 2, 3, 4]


async def test_a_failed_task_is_returned_not_raised() -> None:
    """`wait` returns any final task."""
    async with tracking(FakePollSource(lambda *_: task("failed"))) as tracker:
        assert (await tracker.wait("ta-1", timeout_s=60)).status is TaskStatus.FAILED


async def test_all_waiters_of_one_task_share_its_polls() -> None:
    """A hundred waiters cause as many polls as one."""
    service = FakePollSource(finished_after(3.5))
    async with tracking(service) as tracker:
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                for _ in range(100):
                    group.start_soon(partial(tracker.wait, "ta-1", timeout_s=60))
    assert [round(time_s) for time_s, _ in service.polls] == [0, 1, 2, 3, 4]


async def test_polls_in_flight_never_exceed_the_slots() -> None:
    """The bound holds for any number of due tasks."""
    service = FakePollSource(finished_after(10), slots=8, delay_s=0.5)
    async with tracking(service) as tracker, anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600))
    assert service.most_in_flight == 8


async def test_no_due_task_is_starved_by_the_others() -> None:
    """With too few slots, the most overdue task is polled first."""
    service = FakePollSource(finished_after(1000), slots=2, delay_s=1.0)
    async with tracking(service) as tracker, anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600))
        await anyio.sleep(500)
        group.cancel_scope.cancel()
    times_s: dict[str, list[float]] = {}
    for time_s, task_id in service.polls:
        times_s.setdefault(task_id, []).append(time_s)
    assert len(times_s) == 50
    gaps_s = [later - earlier for times in times_s.values() for earlier, later in pairwise(times)]
    assert max(gaps_s) <= 50 / 2 * 1.0 + 2.0


@pytest.mark.slow
async def test_ten_thousand_tasks_need_one_coroutine() -> None:
    """Apart from the waiters, there are the scheduler and the polls in flight."""
    service = FakePollSource(finished_after(30), slots=16, delay_s=0.001)
    async with tracking(service, every(30.0, first_poll_s=1.0)) as tracker, anyio.create_task_group() as group:
        for number in range(10_000):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=3600))
        await anyio.sleep(5)
        assert tracker.statistics().tracked == 10_000
    assert tracker.statistics().tracked == 0
    assert service.most_in_flight <= 16


async def test_a_timeout_raises_with_the_last_snapshot_and_the_task_can_be_awaited_again() -> None:
    """The task keeps running at the service."""
    async with tracking(FakePollSource(finished_after(10))) as tracker:
        with pytest.raises(TaskTimeout, match=r"still in_progress after 5 s") as caught:
            await tracker.wait("ta-1", timeout_s=5)
        assert caught.value.task == task("in_progress")
        assert (await tracker.wait("ta-1", timeout_s=60)).is_final


async def test_a_timeout_contains_the_last_poll_error() -> None:
    """An outage must not look like a slow image."""
    async with tracking(FakePollSource(lambda *_: ServiceUnavailable("Bad gateway (HTTP 502)"))) as tracker:
        with pytest.raises(TaskTimeout, match=r"without a status after 5 s \(last poll failed: Bad gateway"):
            await tracker.wait("ta-1", timeout_s=5)


async def test_the_last_waiter_that_leaves_ends_the_polling() -> None:
    """A task without waiters is not polled."""
    service = FakePollSource(finished_after(1000))
    async with tracking(service) as tracker:
        for _ in range(2):
            with anyio.move_on_after(3.5):
                await tracker.wait("ta-1", timeout_s=600)
        polls = len(service.polls)
        await anyio.sleep(100)
        assert len(service.polls) == polls
        assert tracker.statistics().tracked == 0


@pytest.mark.parametrize(
    "error_rate",
    [
        TransportError("no response: ReadError"),
        ServiceUnavailable("Bad gateway (HTTP 502)", status=502),
        RateLimited("slow down", status=429),
        ProtocolError("the response is not the service's JSON"),
        InvalidRequest("Forbidden (HTTP 403)", status=403),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_transient_error_does_not_end_the_wait(error_rate: Exception) -> None:
    """The task is charged, so one failed poll does not end the wait."""
    async with tracking(FakePollSource(lambda _, now_s: error_rate if now_s < 5 else task("success"))) as tracker:
        assert (await tracker.wait("ta-1", timeout_s=60)).is_final


async def test_an_outage_is_logged_once_and_not_observed(caplog: pytest.LogCaptureFixture) -> None:
    """Three consecutive failed polls, of any tasks, are an outage."""
    error_rate = ServiceUnavailable("Bad gateway (HTTP 502)")
    service = FakePollSource(lambda task_id, now_s: error_rate if now_s < 20 else task("success", task_id))
    async with tracking(service) as tracker, anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(partial(tracker.wait, f"ta-{number}", timeout_s=600))
    assert caplog.text.count("consecutive polls failed; polling continues: Bad gateway") == 1


async def test_a_bad_task_does_not_stop_the_others() -> None:
    """An unexpected exception of the transport does not stop other tasks."""
    responses = {"ta-bad": RuntimeError("boom"), "ta-wrong": InvalidRequest("bad id", status=400, code=1)}
    async with tracking(
        FakePollSource(lambda task_id, _: responses.get(task_id) or task("success", task_id))
    ) as tracker:
        with pytest.raises(TransportError, match="RuntimeError: boom"):
            await tracker.wait("ta-bad", timeout_s=60)
        with pytest.raises(InvalidRequest):
            await tracker.wait("ta-wrong", timeout_s=60)
        assert (await tracker.wait("ta-good", timeout_s=60)).is_final


async def test_a_rejected_key_ends_every_wait_with_its_own_error() -> None:
    """Every waiter gets an error about its own task."""
    caught: dict[str, AuthenticationError] = {}
    service = FakePollSource(lambda *_: AuthenticationError("Invalid API key", status=401, task_id="ta-0"))

    async def one(task_id: str) -> None:
        try:
            await tracker.wait(task_id, timeout_s=600)
        except AuthenticationError as exc:
            caught[task_id] = exc

    async with tracking(service) as tracker, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, f"ta-{number}")
    assert {task_id: exc.task_id for task_id, exc in caught.items()} == {f"ta-{n}": f"ta-{n}" for n in range(20)}
    assert len({id(exc) for exc in caught.values()}) == 20


async def test_a_new_task_may_be_invisible_for_a_while() -> None:
    """A 404 within a minute of the submit means "not visible yet"."""
    service = FakePollSource(lambda _, now_s: TaskNotFound("task not found") if now_s < 30 else task("success"))
    async with tracking(service) as tracker:
        submit_info = SubmitInfo(submitted_at_s=anyio.current_time())
        assert (await tracker.wait("ta-1", timeout_s=600, submit_info=submit_info)).is_final


async def test_a_task_that_stays_invisible_is_lost_after_minutes() -> None:
    """A task is lost after three 404s over five minutes."""
    async with tracking(
        FakePollSource(lambda *_: TaskNotFound("task not found")), every(30.0, first_poll_s=1.0)
    ) as tracker:
        start_s = anyio.current_time()
        with pytest.raises(TaskLost):
            await tracker.wait("ta-1", timeout_s=3600, submit_info=SubmitInfo(submitted_at_s=start_s))
        assert 360 <= anyio.current_time() - start_s <= 460


async def test_a_visible_task_may_be_missing_for_a_while() -> None:
    """Replicas lag: found, then 404, then found again."""

    def next_snapshot(_: str, now_s: float) -> Task | Exception:
        return TaskNotFound("task not found") if 5 < now_s < 40 else task("success" if now_s > 50 else "pending")

    async with tracking(FakePollSource(next_snapshot)) as tracker:
        assert (await tracker.wait("ta-1", timeout_s=600)).is_final


async def test_a_foreign_id_that_was_never_seen_does_not_exist() -> None:
    """A mistyped id is reported at the first poll, not at the deadline."""
    service = FakePollSource(lambda *_: TaskNotFound("task not found"))
    async with tracking(service) as tracker:
        with pytest.raises(TaskNotFound):
            await tracker.wait("ta-typo", timeout_s=600)
    assert len(service.polls) == 1


async def test_updates_show_each_status_once_and_never_backwards() -> None:
    """Late and repeated statuses are dropped."""
    words = iter(["pending", "pending", "in_progress", "submitted", "unrecognized", "in_progress", "success"])
    async with (
        tracking(FakePollSource(lambda *_: task(next(words)))) as tracker,
        aclosing(tracker.updates("ta-1", timeout_s=60)) as updates,
    ):
        seen = [snapshot.status.value async for snapshot in updates]
    assert seen == ["pending", "in_progress", "success"]


async def test_waiters_that_leave_early_leave_no_tasks() -> None:
    """After two thousand short waits nothing is tracked."""
    service = FakePollSource(finished_after(1e6))
    async with tracking(service, every(1000.0)) as tracker:
        for _ in range(2000):
            with anyio.move_on_after(0):
                await tracker.wait("ta-1", timeout_s=600, submit_info=SubmitInfo(submitted_at_s=anyio.current_time()))
        assert tracker.statistics().tracked == 0


async def test_a_rejected_key_names_each_task_in_its_message() -> None:
    """The message names the task, as the attribute does."""
    service = FakePollSource(lambda *_: AuthenticationError("task ta-0: Invalid API key", status=401, task_id="ta-0"))
    texts: list[str] = []

    async def one(task_id: str) -> None:
        try:
            await tracker.wait(task_id, timeout_s=600)
        except AuthenticationError as exc:
            texts.append(str(exc))

    async with tracking(service) as tracker, anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(one, f"ta-{number}")
    assert sorted(texts) == [f"task ta-{number}: Invalid API key" for number in range(3)]


async def test_leaving_updates_early_ends_the_polling() -> None:
    """Breaking out of the loop removes the waiter."""
    async with tracking(FakePollSource(finished_after(100))) as tracker:
        async with aclosing(tracker.updates("ta-1", timeout_s=600)) as updates:
            async for _ in updates:
                break
        assert tracker.statistics().tracked == 0


async def test_a_task_submitted_elsewhere_is_polled_at_once() -> None:
    """The task may have been finished for hours."""
    service = FakePollSource(finished_after(0))
    async with tracking(service, every(first_poll_s=100.0)) as tracker:
        await tracker.wait("ta-1", timeout_s=600)
    assert service.polls == [(0.0, "ta-1")]


async def test_closing_ends_every_wait_with_the_task_id() -> None:
    """No waiter is left when the tracker closes."""
    errors: list[NanoBananaError] = []

    async def one() -> None:
        try:
            await tracker.wait("ta-1", timeout_s=600)
        except NanoBananaError as exc:
            errors.append(exc)

    async with tracking(FakePollSource(finished_after(1000))) as tracker, anyio.create_task_group() as group:
        group.start_soon(one)
        await anyio.sleep(3)
        tracker.close()
    assert [(type(error), error.task_id) for error in errors] == [(TaskTimeout, "ta-1")]


async def test_a_task_due_earlier_than_all_others_wakes_the_scheduler() -> None:
    """A task that is due sooner shortens the sleep."""
    service = FakePollSource(finished_after(0))
    async with tracking(service, every(first_poll_s=100.0)) as tracker, anyio.create_task_group() as group:
        new = SubmitInfo(submitted_at_s=anyio.current_time())
        group.start_soon(partial(tracker.wait, "ta-late", timeout_s=600, submit_info=new))
        await anyio.sleep(10)
        old = SubmitInfo(submitted_at_s=anyio.current_time() - 95)
        await tracker.wait("ta-soon", timeout_s=600, submit_info=old)
        assert anyio.current_time() - service.start_s < 20


@pytest.mark.parametrize("first", list(TaskStatus))
@pytest.mark.parametrize("second", list(TaskStatus))
async def test_a_late_status_never_moves_a_task_backwards(first: TaskStatus, second: TaskStatus) -> None:
    """Final statuses stay, and unrecognized ones change nothing."""
    after = latest_status(first, second)
    assert after in (first, second)
    assert latest_status(after, first) is after
    if first.is_final:
        assert after is first


def test_the_first_poll_comes_when_images_may_be_ready() -> None:
    """The time is counted from the submit, not from the wait."""
    schedule = PollSchedule(PollPolicy.backoff(first_poll_s=8))
    assert [schedule.next_poll_in_s(None, age_s, 0) for age_s in (0.0, 5.0, 60.0)] == [8.0, 3.0, 0.0]


@given(polls=st.integers(0, 10_000), age_s=st.floats(0, 1e6), seed=st.integers())
def test_intervals_stay_between_zero_and_the_jittered_maximum(polls: int, age_s: float, seed: int) -> None:
    """No value overflows, is negative or infinite."""
    for policy in (PollPolicy(), PollPolicy.backoff()):
        schedule = PollSchedule(policy, Random(seed))
        interval_s = schedule.jittered_s(schedule.next_poll_in_s("m", age_s, polls))
        assert 0 <= interval_s <= policy.max_interval_s * (1 + policy.jitter)


@pytest.mark.parametrize(("polls", "seconds", "gone"), [(2, 1e6, False), (3, 299, False), (3, 300, True)])
def test_a_task_is_lost_after_three_late_polls_over_five_minutes(polls: int, seconds: float, gone: bool) -> None:  # noqa: FBT001 - a table
    """Both conditions have to hold."""
    presence: Presence | Lost = Presence(missing_since_s=1000.0, missing_polls=polls - 1)
    assert isinstance(presence, Presence)
    assert (presence.after_404(1000.0 + seconds, submitted_at_s=0.0) is Lost.LOST) is gone
