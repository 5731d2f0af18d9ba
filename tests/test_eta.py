"""The time left is learned, depends on the age of the task, and holds for nine of ten."""

import heapq
import logging
import statistics
from collections.abc import Callable
from random import Random

import anyio
import attrs
import pytest

from nanobanana_async import (
    Finished,
    GenerationRequest,
    Limits,
    NanoBananaClient,
    PollPolicy,
    Queued,
    StatusChanged,
    Submitted,
)
from nanobanana_async.simulator import Simulator, SimulatorProfile
from nanobanana_async.tracking.schedule import PollSchedule, latency_kind
from tests.latency_samples import bimodal, lognormal

STEADY = SimulatorProfile(median_s=30, sigma=0.4, visibility_delay_s=0)


def shares_before_p90(draw: Callable[[int, Random], float], late_s: Callable[[int], float]) -> tuple[float, float]:
    """Return the share of 10,000 tasks that end before the p90 at age 0, and at age *late_s*.

    At most 200 at once. *draw* and *late_s* depend on the number of the task.
    """
    rng, schedule = Random(1), PollSchedule(PollPolicy(), Random(2))
    kept: tuple[list[bool], list[bool]] = ([], [])
    latencies = [draw(number, rng) for number in range(10_000)]
    events: list[tuple[float, int, str, float, float, int]] = []

    def start(number: int, now_s: float) -> None:
        kept[0].append(latencies[number] <= schedule.eta("m", 0.0).p90_s)
        first_s = schedule.jittered_s(schedule.next_poll_in_s("m", 0.0, 0))
        heapq.heappush(events, (now_s + first_s, number, "poll", now_s, 0.0, 1))
        heapq.heappush(events, (now_s + late_s(number), number, "tell", now_s, 0.0, 0))

    started = 200
    for number in range(started):
        start(number, number * 0.02)
    while events:
        now_s, number, what, began_s, last_s, polls = heapq.heappop(events)
        age_s, latency_s = now_s - began_s, latencies[number]
        if what == "tell":
            if age_s < latency_s:
                kept[1].append(latency_s - age_s <= schedule.eta("m", age_s).p90_s)
            continue
        schedule.observe("m", last_s, age_s, done=age_s >= latency_s)
        if age_s < latency_s:
            next_s = schedule.jittered_s(schedule.next_poll_in_s("m", age_s, polls))
            heapq.heappush(events, (now_s + next_s, number, "poll", began_s, age_s, polls + 1))
        elif started < len(latencies):
            start(started, now_s)
            started += 1
    assert len(kept[1]) > 200
    return statistics.fmean(kept[0]), statistics.fmean(kept[1])


SLOWER, FASTER = lognormal(40, 0.4), lognormal(20, 0.4)


@pytest.mark.parametrize(
    ("draw", "late_s"),
    [
        pytest.param(lambda _, rng: lognormal(20, 0.5)(rng), lambda _: 40.0, id="lognormal"),
        pytest.param(lambda _, rng: bimodal(rng), lambda _: 2 * 13.4, id="bimodal"),
        pytest.param(
            lambda number, rng: (FASTER if number < 5000 else SLOWER)(rng),
            lambda number: 40.0 if number < 5000 else 80.0,
            id="slower after a while",
        ),
        pytest.param(
            lambda number, rng: (SLOWER if number < 5000 else FASTER)(rng),
            lambda number: 80.0 if number < 5000 else 40.0,
            id="faster after a while",
        ),
    ],
)
def test_nine_of_ten_tasks_end_before_the_p90(
    draw: Callable[[int, Random], float], late_s: Callable[[int], float]
) -> None:
    """At the submit, and at twice the median age: 85 to 95 % of 10,000 tasks."""
    early, late = shares_before_p90(draw, late_s)
    assert 0.85 <= early <= 0.95
    assert 0.85 <= late <= 0.95


def test_half_of_the_tasks_end_before_the_median() -> None:
    """A few hundred tasks are enough to know it."""
    schedule, rng = PollSchedule(PollPolicy()), Random(3)
    latencies = [lognormal(30, 0.4)(rng) for _ in range(500)]
    for latency_s in latencies:
        since_s = 0.0
        while since_s < latency_s:
            schedule.observe("m", since_s, since_s + 1, done=since_s + 1 >= latency_s)
            since_s += 1
    assert schedule.eta("m", 0.0).median_s == pytest.approx(30, rel=0.1)
    assert schedule.eta("m", 60.0).p90_s > schedule.eta("m", 20.0).p90_s - 20, "a late task is not nearly done"


def test_pressure_widens_it() -> None:
    """Polls are rarer then, so that the end is noticed later."""
    schedule = PollSchedule(PollPolicy())
    usual, pressed = schedule.eta("m", 0.0), schedule.eta("m", 0.0, pressure=4.0)
    assert pressed.median_s > usual.median_s
    assert pressed.p90_s - usual.p90_s > pressed.median_s - usual.median_s


def test_an_image_size_that_was_not_seen_borrows_the_latency_of_the_nearest() -> None:
    """And begins with it, once it is seen."""
    schedule, rng = PollSchedule(PollPolicy()), Random(4)
    for size, median_s in (("1k", 10), ("4k", 80)):
        for _ in range(300):
            latency_s = lognormal(median_s, 0.2)(rng)
            schedule.observe(latency_kind("m", size), 0.0, latency_s, done=True)
    near = schedule.eta(latency_kind("m", None), 0.0).median_s
    assert near == schedule.eta(latency_kind("m", "1k"), 0.0).median_s
    assert schedule.eta("other", 0.0).median_s == pytest.approx(20, rel=0.05), "another model is not near"
    schedule.observe(latency_kind("m", None), 0.0, 10.0, done=True)
    assert schedule.eta(latency_kind("m", None), 0.0).median_s == pytest.approx(near, rel=0.3)


@pytest.mark.anyio
@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_latencies_are_learned_by_model_and_image_size() -> None:
    """4k takes longer than 1k, and its polls come later."""
    async with _client(Simulator(STEADY)) as client:
        await client.generate("a fox", model="google/nano-banana-2", image_size="4k")
        await client.generate("a fox", model="google/nano-banana-2")
        assert set(client.statistics().latency_models) == {"google/nano-banana-2@4k", "google/nano-banana-2"}


@pytest.mark.anyio
@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_handle_and_the_events_state_the_time_left() -> None:
    """From the line to the last status. A finished task has none, nor has one of unknown age."""
    events: list[object] = []
    simulator = Simulator(STEADY, delay_s=2)
    async with _client(simulator, limits=Limits(max_submits=1), on_event=events.append) as client:
        handles = []
        async with anyio.create_task_group() as group:

            async def submit(number: int) -> None:
                handles.append(await client.submit(GenerationRequest(f"fox {number}")))

            for number in range(10):
                group.start_soon(submit, number)
        first = handles[0].eta()
        assert first is not None
        assert 0 < first.median_s < first.p90_s
        await handles[0].result()
        assert handles[0].eta() is None
        assert client.task("ta-of-another").eta() is None
        for handle in handles:
            await handle.result()
    queued = [event for event in events if isinstance(event, Queued)]
    assert queued[9].position == 10 or queued[9].position == 9
    assert queued[0].eta is not None
    assert queued[9].eta is not None
    assert queued[9].eta.median_s > queued[0].eta.median_s + 5, "the line before the submit counts"
    assert all(event.eta is not None for event in events if isinstance(event, StatusChanged))
    assert any(isinstance(event, Submitted) for event in events)
    assert any(isinstance(event, Finished) for event in events)


@pytest.mark.anyio
@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_task_that_takes_longer_than_nearly_all_others_is_marked_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the statistics and in the log."""
    simulator = Simulator(attrs.evolve(STEADY, median_s=10, sigma=0.1))
    async with _client(simulator) as client:
        async for _ in client.generate_many([f"fox {number}" for number in range(400)], max_in_flight=50):
            pass
        assert client.statistics().slow_tasks <= 4
        before = client.statistics().slow_tasks
        simulator.service.profile = attrs.evolve(simulator.service.profile, median_s=300)
        caplog.set_level(logging.WARNING)
        caplog.clear()
        await client.generate("an owl")
        assert client.statistics().slow_tasks == before + 1
    assert sum("is slow" in record.getMessage() for record in caplog.records) == 1


def _client(simulator: Simulator, **options: object) -> NanoBananaClient:
    return NanoBananaClient("dk-test", transport=simulator, **options)  # type: ignore[arg-type]
