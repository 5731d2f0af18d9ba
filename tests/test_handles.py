"""Handles created again, shared, or with short timeouts. Clients used from elsewhere."""

import gc
import weakref
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial

import anyio
import anyio.to_thread
import attrs
import pytest

from nanobanana_async import (
    AuthenticationError,
    GeneratedImage,
    NanoBananaClient,
    PollPolicy,
    ServiceUnavailable,
    Task,
    TaskNotFound,
    TaskStatus,
    TaskTimeout,
    WrongEventLoop,
)
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from tests.fakes import accepted, script, state
from tests.tracker_fakes import FakePollSource, every, finished_after, task, tracking

HEAVY = GeneratedImage(data=b"x" * 1000)

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_handle_created_again_knows_that_its_task_is_new() -> None:
    """A web app submits in one request and waits in the next, before the task is visible."""
    simulator = Simulator(SimulatorProfile(median_s=40, sigma=0, visibility_delay_s=25))
    async with simulator.client() as client:
        handle = await client.submit("a fox")
        assert (await client.task(handle.task_id).query()).status is TaskStatus.PENDING
        assert (await client.task(handle.task_id).wait()).images
        assert client.statistics().median_latency_s  # and its latency was observed


async def test_a_handle_with_submitted_at_knows_that_its_task_is_new() -> None:
    """In another process only the id is known, and a clock that was set back changes nothing."""
    simulator = Simulator(SimulatorProfile(median_s=40, sigma=0, visibility_delay_s=25))
    async with simulator.client() as client:
        task_id = (await client.submit("a fox")).task_id
    async with simulator.client() as client:
        with pytest.raises(TaskNotFound):
            await client.task(task_id).wait()
        for age_s in (1, -86_400):
            moment = datetime.now(UTC) - timedelta(seconds=age_s)
            assert (await client.task(task_id, submitted_at=moment).wait()).images


async def test_a_second_wait_shares_the_poll_in_flight() -> None:
    """A waiter that returns later resumes the schedule, so short timeouts do not cause extra polls."""
    service = FakePollSource(finished_after(30), delay_s=5)
    async with tracking(service, every(2)) as tracker:
        for _ in range(100):
            with pytest.raises(TaskTimeout):
                await tracker.wait("ta-1", timeout_s=0.1)
        assert len(service.polls) <= 4
        assert service.most_in_flight == 1
        assert (await tracker.wait("ta-1", timeout_s=60)).is_final


async def test_the_first_final_status_stays() -> None:
    """The status stays for the same handle, for new ones, and for a query in flight."""
    responses = iter(["success", "failed", "in_progress"])
    transport = script(accepted(), *(state(word) for word in responses))
    async with NanoBananaClient("dk-test", transport=transport, polling=every(1)) as client:
        handle = await client.submit("a fox")
        assert (await handle.wait()).status is TaskStatus.SUCCESS
        seen = [await handle.query(), await client.task("ta-1").query(), await client.task("ta-1").wait()]
    assert {task.status for task in seen} == {TaskStatus.SUCCESS}


async def test_one_task_that_always_fails_backs_off_alone() -> None:
    """Other tasks are polled as usual, and the failing one less and less."""

    def next_status(task_id: str, now_s: float) -> Task | Exception:
        return ServiceUnavailable("no") if task_id == "ta-bad" else finished_after(600)(task_id, now_s)

    service = FakePollSource(next_status)
    async with (
        tracking(service, PollPolicy.backoff(first_poll_s=1, initial_s=1, multiplier=1, max_s=15)) as tracker,
        anyio.create_task_group() as group,
    ):
        for task_id in ("ta-bad", "ta-good"):
            group.start_soon(partial(tracker.wait, task_id, timeout_s=500))
        await anyio.sleep(300)
        polls = Counter(task_id for _, task_id in service.polls)
        group.cancel_scope.cancel()
    assert polls["ta-bad"] < 60 < polls["ta-good"]


async def test_a_removed_waiter_releases_the_task() -> None:
    """The delay queue may keep a deadline for a while, but not the image."""
    service = FakePollSource(lambda task_id, _: attrs.evolve(task("success", task_id), images=(HEAVY,)))
    async with tracking(service) as tracker:
        tracked, _ = tracker.track("ta-1")
        gone = weakref.ref(await tracker.wait("ta-1", timeout_s=10))
        assert tracked.waiters == []
        del tracked
        gc.collect()
        assert gone() is None


@pytest.mark.real_time
async def test_statistics_need_no_event_loop() -> None:
    """Statistics are read after the run, and by metrics threads."""
    async with Simulator(FAST_PROFILE).client() as client:
        await client.generate("a fox")
        figures = await anyio.to_thread.run_sync(client.statistics)
    assert figures.latency_models == client.statistics().latency_models != {}
    assert figures.overdue_s == 0


@pytest.mark.real_time
@pytest.mark.parametrize("other_loop", [True, False])
async def test_closing_from_another_loop_is_rejected(other_loop: bool) -> None:  # noqa: FBT001 - a parameter
    """The error is raised before anything is closed."""
    simulator = Simulator(SimulatorProfile(median_s=0.3, sigma=0, visibility_delay_s=0))

    async def close_elsewhere() -> None:
        with pytest.raises(WrongEventLoop, match="another event loop"):
            await anyio.to_thread.run_sync(anyio.run, client.aclose)

    async with simulator.client() as client, anyio.create_task_group() as group:
        handle = await client.submit("a fox")
        if other_loop:
            group.start_soon(close_elsewhere)
        assert (await handle.wait(timeout_s=5)).is_final


@pytest.mark.parametrize("numbers", [None, [], [1.0], ["x"] * 112, [float("nan")] * 112, [10**400] * 112, 5])
def test_an_invalid_latency_model_is_rejected_by_name(numbers: object) -> None:
    """A file edited by hand or truncated is an error."""
    with pytest.raises(ValueError, match=r"latency_models: .* for 'm'"):
        NanoBananaClient("dk-test", polling=PollPolicy(latency_models={"m": numbers}))  # type: ignore[dict-item]


async def test_a_rejected_key_ends_also_a_poll_that_has_no_waiter() -> None:
    """A later wait polls again."""
    answers: list[Task | Exception] = [AuthenticationError("no"), task("success")]
    service = FakePollSource(lambda *_: answers.pop(0), delay_s=1.0)
    async with tracking(service) as tracker:
        with anyio.move_on_after(0.5):
            await tracker.wait("ta-1", timeout_s=60)
        await anyio.sleep(5)
        assert (await tracker.wait("ta-1", timeout_s=60)).is_final


async def test_a_poll_that_outlives_its_waiter_is_never_doubled() -> None:
    """The caches are bounded, and a poll in flight is remembered until it ends."""
    service = FakePollSource(lambda task_id, _: task("in_progress", task_id), delay_s=5.0, slots=2000)
    async with tracking(service) as tracker:
        with anyio.move_on_after(1):
            await tracker.wait("ta-1", timeout_s=60)
        for number in range(1100):
            tracker.remove_waiter(*tracker.track(f"other-{number}"))
        with anyio.move_on_after(2):
            await tracker.wait("ta-1", timeout_s=60)
        assert [task_id for _, task_id in service.polls].count("ta-1") == 1


async def test_a_poll_that_outlives_the_end_of_its_task_stops_nothing() -> None:
    """A rejected key ends all tasks, also those whose poll is in flight."""
    answers: dict[str, list[Task | Exception]] = {
        "ta-1": [AuthenticationError("no")],
        "ta-2": [task("in_progress", "ta-2"), task("success", "ta-2")],
    }

    async def wait(task_id: str) -> None:
        with pytest.raises(AuthenticationError):
            await tracker.wait(task_id, timeout_s=60)

    class Uneven(FakePollSource):
        async def poll(self, task_id: str) -> Task:
            self.delay_s = 1.0 if task_id == "ta-1" else 5.0
            return await super().poll(task_id)

    service = Uneven(lambda task_id, _: answers[task_id].pop(0))
    async with tracking(service) as tracker:
        async with anyio.create_task_group() as group:
            group.start_soon(wait, "ta-1")
            group.start_soon(wait, "ta-2")
        await anyio.sleep(10)
        assert (await tracker.wait("ta-2", timeout_s=60)).is_final


async def test_g4_a_time_without_a_zone_is_refused_with_words() -> None:
    """G4: comparing it with a time that has one raised a bare TypeError."""
    async with Simulator(FAST_PROFILE).client() as client:
        with pytest.raises(ValueError, match="submitted_at: expected a time with a time zone, got 2026-11-26T10:00:00"):
            client.task("ta-1", submitted_at=datetime(2026, 11, 26, 10))  # noqa: DTZ001 - the test's subject


async def test_t6_one_id_for_two_submits_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """T6: both calls get the same image, and one was charged for nothing."""
    async with NanoBananaClient("dk-1", transport=script(accepted("ta-1"))) as client:
        await client.submit("a fox")
        assert caplog.text == ""
        await client.submit("a hare")
    assert "task ta-1: the service has given its id to two submits" in caplog.text
