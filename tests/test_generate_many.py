"""`generate_many` yields one outcome per request with bounded concurrency and backpressure."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import anyio
import pytest

from nanobanana_async import (
    ClientClosed,
    ConfigurationError,
    Failed,
    GenerationRequest,
    NanoBananaClient,
    NoImage,
    Outcome,
    SubmissionUnknown,
    Succeeded,
    TaskFailed,
    Unknown,
)
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from tests.fakes import PNG, lost, script

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def prompt_of(outcome: Outcome) -> str:
    """Return the prompt."""
    return outcome.request.prompt


async def test_each_request_has_one_outcome() -> None:
    """The keys are the positions of the requests."""
    simulator = Simulator(
        SimulatorProfile(median_s=0.02, visibility_delay_s=0, failed_tasks=0.2, text_only=0.2), seed=3
    )
    async with simulator.client() as client:
        outcomes = [outcome async for outcome in client.generate_many(f"fox {n}" for n in range(40))]
    assert sorted(int(outcome.key) for outcome in outcomes) == list(range(40))
    assert sorted(map(prompt_of, outcomes)) == sorted(charge.prompt for charge in simulator.charges)
    kinds = {type(outcome.error) for outcome in outcomes if isinstance(outcome, Failed)}
    assert kinds == {TaskFailed, NoImage}
    assert all(outcome.task.images for outcome in outcomes if isinstance(outcome, Succeeded))
    assert all(outcome.error.task_id for outcome in outcomes if isinstance(outcome, Failed))


async def test_outcomes_come_in_completion_order() -> None:
    """The order of the requests does not matter."""
    simulator = Simulator(SimulatorProfile(median_s=0.1, sigma=1.5, visibility_delay_s=0), seed=1)
    async with simulator.client() as client:
        keys = [outcome.key async for outcome in client.generate_many(map(str, range(30)))]
    assert sorted(keys, key=int) != keys


async def test_a_slow_consumer_stops_the_submits() -> None:
    """At most `max_in_flight` requests run or wait to be consumed."""
    simulator = Simulator(FAST_PROFILE)
    most = 0
    async with simulator.client() as client:
        read = 0
        async for _ in client.generate_many(map(str, range(40)), max_in_flight=5):
            await anyio.sleep(0.01)
            most = max(most, len(simulator.charges) - read)
            read += 1
    assert read == len(simulator.charges) == 40
    assert most <= 5


@pytest.mark.real_time
async def test_requests_may_come_from_an_endless_async_generator() -> None:
    """A request is taken when a slot is free."""
    taken = 0

    async def endless() -> AsyncIterator[GenerationRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield GenerationRequest(f"fox {taken}", images=[PNG])
            await anyio.lowlevel.checkpoint()

    simulator = Simulator(FAST_PROFILE)
    async with simulator.client() as client:
        outcomes = client.generate_many(endless(), max_in_flight=3)
        done = [await anext(outcomes) for _ in range(9)]
        await outcomes.aclose()
    assert all(isinstance(outcome, Succeeded) for outcome in done)
    assert taken <= 9 + 3


async def test_stopping_early_logs_the_charged_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """Every charged task that was not consumed is in the log."""
    simulator = Simulator(SimulatorProfile(median_s=0.2, sigma=1, visibility_delay_s=0), seed=2)
    async with (
        simulator.client() as client,
        aclosing(client.generate_many(map(str, range(50)), max_in_flight=10)) as outcomes,
    ):
        first = await anext(outcomes)
        await anyio.sleep(0.2)  # others end and are not consumed
    assert isinstance(first, Succeeded)
    named = {charge.task_id for charge in simulator.charges if charge.task_id in caplog.text}
    assert named | {first.task.task_id} == {charge.task_id for charge in simulator.charges}
    assert "its outcome was not consumed" in caplog.text
    assert "the caller was cancelled" in caplog.text


async def test_a_submit_without_a_response_is_unknown_and_others_continue() -> None:
    """The submit is neither resubmitted nor reported as failed."""
    transport = script(lost())
    async with Simulator(FAST_PROFILE).client(wrap=lambda _: transport) as client:
        outcomes = [outcome async for outcome in client.generate_many(["a", "b"])]
    assert all(isinstance(outcome, Unknown) and isinstance(outcome.error, SubmissionUnknown) for outcome in outcomes)
    assert len(transport.requests) == 2


async def test_an_invalid_prompt_is_raised_after_the_others() -> None:
    """Running requests are yielded before the error."""
    simulator = Simulator(FAST_PROFILE)
    async with simulator.client() as client:
        outcomes = client.generate_many(["a", "b", "", "c"])
        done = [prompt_of(await anext(outcomes)) for _ in range(2)]
        with pytest.raises(ValueError, match="prompt: expected text"):
            await anext(outcomes)
    assert sorted(done) == ["a", "b"]


async def test_a_request_that_json_cannot_encode_fails_alone() -> None:
    """`extra` is encoded when the request is sent."""
    requests = [GenerationRequest("a", extra={"x": float("nan")}), GenerationRequest("b")]
    async with Simulator(FAST_PROFILE).client() as client:
        outcomes = {prompt_of(outcome): outcome async for outcome in client.generate_many(requests)}
    assert isinstance(outcomes["b"], Succeeded)
    assert isinstance(outcomes["a"], Failed)
    assert isinstance(outcomes["a"].error, ConfigurationError)


async def test_closing_the_client_during_a_run_raises() -> None:
    """Ending quietly would look like success."""
    simulator = Simulator(SimulatorProfile(median_s=30, visibility_delay_s=0))
    client = simulator.client()

    outcomes = client.generate_many(map(str, range(9)), max_in_flight=2)
    async with anyio.create_task_group() as group:
        group.start_soon(_close_after, client, simulator, 2)
        with pytest.raises(ClientClosed, match="closed"):
            await _exhaust(outcomes)


async def _close_after(client: NanoBananaClient, simulator: Simulator, charges: int) -> None:
    while len(simulator.charges) < charges:
        await anyio.sleep(0.01)
    await client.aclose()


async def _exhaust(outcomes: AsyncIterator[Outcome]) -> None:
    async for outcome in outcomes:
        assert isinstance(outcome, Failed)


async def test_max_in_flight_of_zero_is_rejected() -> None:
    """Zero would wait without end."""
    async with Simulator(FAST_PROFILE).client() as client:
        with pytest.raises(ValueError, match="max_in_flight: expected at least 1"):
            await anext(client.generate_many(["a"], max_in_flight=0))
