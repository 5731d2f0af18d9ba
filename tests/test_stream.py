"""The events of a request: streams, and the hook of a client."""

import asyncio
import contextlib
import itertools

import anyio
import pytest

from nanobanana_async import (
    ClientClosed,
    Event,
    Finished,
    InvalidRequest,
    Limits,
    NanoBananaClient,
    Queued,
    Saved,
    StatusChanged,
    SubmissionUnknown,
    SubmitFailed,
    Submitted,
    TaskStatus,
    TaskTimeout,
    Throttled,
)
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE, Simulator, SimulatorProfile
from tests.batches import nth_post
from tests.fakes import InterceptingTransport, lost, rejected

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time, pytest.mark.usefixtures("no_threads")]

SLOW = SimulatorProfile(median_s=30, sigma=0.1, visibility_delay_s=0)


def client_of(simulator: Simulator, **options: object) -> NanoBananaClient:
    """Return a client with one submit slot."""
    return NanoBananaClient(
        "dk-test", transport=simulator, polling=FAST_POLLING, limits=Limits(max_submits=1), **options  # type: ignore[arg-type]
    )  # fmt: skip


async def collect(client: NanoBananaClient, prompt: str, **options: object) -> list[Event]:
    """Return all events of one request."""
    return [event async for event in client.stream(prompt, **options)]  # type: ignore[arg-type]


async def test_a_stream_goes_from_the_place_in_line_to_the_final_task() -> None:
    """Each event names the same call, its owner, and the task once it is known."""
    async with client_of(Simulator(SLOW)) as client:
        events = await collect(client, "a fox", owner="discord:42")
    assert [kind for kind, _ in itertools.groupby(map(type, events))] == [Queued, Submitted, StatusChanged, Finished]
    statuses = [event.task.status for event in events if isinstance(event, StatusChanged)]
    assert len(set(statuses)) == len(statuses)
    assert {(event.key, event.owner) for event in events} == {(events[0].key, "discord:42")}
    first, last = events[0], events[-1]
    assert isinstance(first, Queued)
    assert (first.position, first.task_id) == (1, None)
    assert first.eta is not None
    assert isinstance(last, Finished)
    assert last.task.images
    assert {event.task_id for event in events[1:]} == {last.task.task_id}
    assert all(one.at <= other.at for one, other in itertools.pairwise(events))


async def test_the_place_in_line_is_yielded_when_it_changes() -> None:
    """Other owners get their turns in between."""
    async with client_of(Simulator(FAST_PROFILE, delay_s=10)) as client, anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(client.submit, f"a hare, {number}")
        await anyio.sleep(1)
        events = await collect(client, "a fox")
    assert [event.position for event in events if isinstance(event, Queued)] == [3, 2, 1]


async def test_a_ticker_repeats_the_last_event() -> None:
    """A display with a clock needs no timer of its own."""
    async with client_of(Simulator(SLOW)) as client:
        events = await collect(client, "a fox", every_s=2)
        with pytest.raises(ValueError, match="every_s: expected"):
            await collect(client, "a fox", every_s=0)
    assert sum(isinstance(event, StatusChanged) for event in events) > 8


async def test_a_failed_task_is_the_last_event_and_raises_nothing() -> None:
    """Its reason is in the task."""
    async with client_of(Simulator(SimulatorProfile(median_s=1, failed_tasks=1))) as client:
        last = (await collect(client, "a fox"))[-1]
    assert isinstance(last, Finished)
    assert last.task.status is TaskStatus.FAILED


async def test_a_stream_raises_what_ends_the_request_otherwise() -> None:
    """A rejection, an unknown outcome, and a timeout are errors."""
    simulator = Simulator(SLOW)
    for result, error in ((rejected(400), InvalidRequest), (lost(), SubmissionUnknown)):
        transport = InterceptingTransport(simulator, nth_post(lambda _, result=result: result))  # type: ignore[misc]
        async with NanoBananaClient("dk-test", transport=transport) as client:
            with pytest.raises(error):
                await collect(client, "a fox")
    async with client_of(simulator) as client:
        with pytest.raises(TaskTimeout) as caught:
            await collect(client, "a fox", timeout_s=5)
    assert caught.value.task_id == simulator.charges[0].task_id


async def test_leaving_a_stream_gives_up_the_place_in_line() -> None:
    """Nothing is submitted for it."""
    simulator = Simulator(FAST_PROFILE, delay_s=10)
    async with client_of(simulator) as client, anyio.create_task_group() as group:
        group.start_soon(client.submit, "a hare")
        await anyio.sleep(1)
        async with contextlib.aclosing(client.stream("a fox")) as events:
            async for event in events:
                assert isinstance(event, Queued)
                break
        await client.submit("an owl")
    assert [charge.prompt for charge in simulator.charges] == ["a hare", "an owl"]


async def test_leaving_a_stream_during_the_post_reports_an_orphan() -> None:
    """The task is charged, and no caller knows its id."""
    simulator = Simulator(FAST_PROFILE, delay_s=2)
    orphans: list[str] = []
    async with client_of(simulator, on_orphan=lambda handle: orphans.append(handle.task_id)) as client:
        with anyio.move_on_after(1.5):
            await collect(client, "a fox")
        await anyio.sleep(5)
        assert orphans == [charge.task_id for charge in simulator.charges]
        assert len(orphans) == 1


async def test_the_hook_gets_every_event_of_the_client() -> None:
    """Also of calls that are not streams, and of pauses that the service asks for."""
    events: list[Event] = []
    simulator = Simulator(SLOW)
    transport = InterceptingTransport(simulator, nth_post(lambda n: rejected(429, retry_after="3") if n == 0 else None))
    async with NanoBananaClient("dk-test", transport=transport, on_event=events.append) as client:
        task = await client.generate("a fox", owner="x")
    kinds = [kind for kind, _ in itertools.groupby(map(type, events))]
    assert kinds == [Queued, Throttled, Submitted, StatusChanged, Finished]
    assert isinstance(events[1], Throttled)
    assert events[1].pause_s == 3
    assert {event.owner for event in events if not isinstance(event, Throttled)} == {"x"}
    assert events[-1].task_id == task.task_id


async def test_the_hook_learns_of_failed_submits_and_saved_images(tmp_path: object) -> None:
    """A display counts both."""
    events: list[Event] = []
    simulator = Simulator(FAST_PROFILE)
    transport = InterceptingTransport(simulator, nth_post(lambda n: lost() if n == 0 else None))
    async with NanoBananaClient("dk-test", transport=transport, on_event=events.append, polling=FAST_POLLING) as client:
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", owner="x")
        task = await client.generate("a hare", owner="y")
        await client.save(task, str(tmp_path))
    failed = next(event for event in events if isinstance(event, SubmitFailed))
    assert (failed.owner, type(failed.error)) == ("x", SubmissionUnknown)
    saved = events[-1]
    assert isinstance(saved, Saved)
    assert (saved.owner, saved.task_id, saved.image.path.suffix) == ("y", task.task_id, ".png")


async def test_a_stream_ends_when_the_client_is_closed_while_it_waits() -> None:
    """With the error that a submit has."""
    client = client_of(Simulator(FAST_PROFILE, delay_s=10))
    async with anyio.create_task_group() as group:
        group.start_soon(client.submit, "a hare")
        await anyio.sleep(1)

        async def watch() -> None:
            with pytest.raises(ClientClosed):
                await collect(client, "a fox")

        group.start_soon(watch)
        await anyio.sleep(1)
        await client.aclose()


@pytest.mark.parametrize("error", [RuntimeError("boom"), asyncio.CancelledError("of a future in the hook")])
async def test_a_hook_that_raises_harms_nothing(caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    """Its error is logged."""

    def hook(_: Event) -> None:
        raise error

    async with client_of(Simulator(FAST_PROFILE), on_event=hook) as client:
        assert (await client.generate("a fox")).images
    assert "on_event failed" in caplog.text
