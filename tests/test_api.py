"""The operations of the service: rate-limited, classified, and retried as the policy allows."""

import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import pairwise
from typing import Any

import anyio
import attrs
import pytest

from nanobanana_async import (
    AuthenticationError,
    ClientClosed,
    ConfigurationError,
    GenerationRequest,
    InsufficientCredits,
    InvalidRequest,
    LedgerError,
    Limits,
    NanoBananaError,
    NotSent,
    Phase,
    ProtocolError,
    RateLimited,
    RetryPolicy,
    ServiceUnavailable,
    SubmissionUnknown,
    Task,
    Timeouts,
    TransportError,
    WireRequest,
    WireResponse,
)
from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.byte_budget import ByteBudget
from nanobanana_async._concurrency.slots import SlotPool, SlotWaiter
from nanobanana_async.api.fair_queue import FairQueue
from nanobanana_async.api.flow_control import FlowControl
from nanobanana_async.api.operations import ServiceApi
from nanobanana_async.api.submit import NO_RECORD, NO_SLOT_MESSAGE, AcceptedSubmit, NoRecord, Reserve, SubmitLoop
from nanobanana_async.api.turn import Turn
from nanobanana_async.policies import OwnerLimits, ResubmitLevel
from nanobanana_async.protocols import AttemptEnd, SubmitRecord, Verdict
from nanobanana_async.transport.checked import CheckedTransport
from nanobanana_async.wire.endpoint import ApiKey, Endpoint
from tests.fakes import ScriptedTransport, Step, accepted, finished, lost, rejected, response, script, submits
from tests.virtual_time import jump

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

FOX = GenerationRequest("a fox")
HTML = response(502, body=b"<html>Bad gateway</html>")


@attrs.frozen
class Service:
    """The operations over one transport, as a client composes them."""

    background: BackgroundTaskGroup
    query: Callable[[str], Awaitable[Task]]
    balance: Callable[[], Awaitable[Decimal]]
    loop: SubmitLoop
    slots: SlotPool
    queue: FairQueue

    async def submit_prompt(self, prompt: str) -> None:
        """Submit one request for this prompt."""
        await self.submit(request=GenerationRequest(prompt))

    async def submit(
        self,
        *,
        deadline_s: float = math.inf,
        record: SubmitRecord = NO_RECORD,
        request: GenerationRequest = FOX,
    ) -> AcceptedSubmit:
        """Submit one request."""
        await self.background.ensure_started()
        waiter = SlotWaiter()
        try:
            slot = await self.slots.acquire(deadline_s, waiter)
        except TimeoutError:
            raise NotSent(NO_SLOT_MESSAGE) from None
        with Turn(self.slots, self.queue, waiter, slot, deadline_s) as turn:
            return await self.loop.submit(request, turn, record=record)


def service_over(
    transport: ScriptedTransport,
    *,
    limits: Limits = Limits(),
    retry: RetryPolicy = RetryPolicy(),
    timeouts: Timeouts = Timeouts(),
) -> Service:
    """Return the operations over *transport*."""

    async def unchanged(request: GenerationRequest, _: Reserve) -> GenerationRequest:
        return request

    background, checked, flow = BackgroundTaskGroup(), CheckedTransport(transport), FlowControl(limits, retry)
    endpoint = Endpoint.resolve(ApiKey("dk-test"), "https://api.example")
    memory = ByteBudget(limits.max_download_bytes)
    api = ServiceApi(checked, background, endpoint, flow, timeouts, max_polls=limits.max_polls, memory=memory)
    loop = SubmitLoop(
        checked,
        background,
        endpoint,
        flow,
        timeouts,
        prepare=unchanged,
    )
    queue = FairQueue(lambda _: OwnerLimits(), background.start_soon)
    slots = SlotPool(flow.max_submits, background.start_soon, queue)
    flow.on_limit = slots.resize
    return Service(background, api.query, api.balance, loop, slots, queue)


@asynccontextmanager
async def running(transport: ScriptedTransport, **options: Any) -> AsyncIterator[Service]:  # noqa: ANN401 - passed on
    """Run the operations over *transport*."""
    service = service_over(transport, **options)
    try:
        yield service
    finally:
        with anyio.CancelScope(shield=True):
            await service.background.aclose(drain_s=100)


async def submit(transport: ScriptedTransport, *, resubmit: ResubmitLevel = "api-5xx") -> AcceptedSubmit:
    """Submit one request and return the result."""
    async with running(transport, retry=RetryPolicy(resubmit=resubmit)) as api:
        return await api.submit()


async def test_an_accepted_submit_returns_its_task_id() -> None:
    """An accepted submit is one POST and has no possible duplicates."""
    transport = script(accepted("ta-7"))
    assert await submit(transport) == AcceptedSubmit("ta-7", 0)
    assert submits(transport.requests) == 1


async def test_a_submit_that_never_connected_is_retried() -> None:
    """A submit that never connected cost nothing, so it is retried."""
    transport = script(lost(Phase.CONNECT), lost(Phase.CONNECT), accepted())
    assert (await submit(transport)).possible_duplicates == 0
    assert submits(transport.requests) == 3


@pytest.mark.parametrize(
    ("step", "error", "posts"),
    [
        pytest.param(lost(Phase.CONNECT), NotSent, 3, id="never-connected"),
        pytest.param(lost(Phase.CONNECT, permanent=True), ConfigurationError, 1, id="bad-certificate"),
        pytest.param(lost(Phase.SEND), SubmissionUnknown, 1, id="no-response"),
        pytest.param(lost(Phase.RESPONSE, partial=response(body=b"{")), SubmissionUnknown, 1, id="truncated-response"),
        pytest.param(response(200, body=b"<html>"), SubmissionUnknown, 1, id="200-html"),
        pytest.param(response(408, body=b""), SubmissionUnknown, 2, id="408-once-more"),
        pytest.param(rejected(400, 1, "prompt is required"), InvalidRequest, 1, id="400"),
        pytest.param(rejected(401), AuthenticationError, 1, id="401"),
        pytest.param(rejected(500), SubmissionUnknown, 3, id="service-500"),
        pytest.param(rejected(500, 1, "insufficient credit"), SubmissionUnknown, 3, id="service-500-about-credit"),
        pytest.param(HTML, SubmissionUnknown, 1, id="gateway-502"),
    ],
)
async def test_by_default_safe_failures_and_the_services_own_500_are_retried(
    step: Step, error: type[NanoBananaError], posts: int
) -> None:
    """The default policy follows the default column of the table."""
    transport = script(step)
    with pytest.raises(error) as caught:
        await submit(transport)
    assert type(caught.value) is error
    assert submits(transport.requests) == posts


@pytest.mark.parametrize(
    ("resubmit", "posts"),
    [("never", (1, 1, 1)), ("api-5xx", (3, 1, 1)), ("any-5xx", (3, 3, 1)), ("always", (3, 3, 3))],
)
async def test_each_resubmit_level_resubmits_what_it_names(
    resubmit: ResubmitLevel, posts: tuple[int, int, int]
) -> None:
    """Each level handles the service's 500, a gateway's 502 and a lost response as it says."""
    counts = []
    for step in (rejected(500), HTML, lost(Phase.SEND)):
        transport = script(step)
        with pytest.raises(NanoBananaError):
            await submit(transport, resubmit=resubmit)
        counts.append(submits(transport.requests))
    assert tuple(counts) == posts


async def test_resubmits_that_may_duplicate_a_charge_are_counted() -> None:
    """Two 500s of the service and then an id are two possible duplicates."""
    assert await submit(script(rejected(500), rejected(500), accepted())) == AcceptedSubmit("ta-1", 2)


async def test_a_service_error_that_stays_tells_each_possible_charge() -> None:
    """M6: each of the three submits may have been charged, and the error says so."""
    with pytest.raises(SubmissionUnknown, match=r"no \(code 1\).*3 submits may each have been charged") as caught:
        await submit(script(rejected(500)))
    assert (caught.value.status, caught.value.possible_duplicates) == (500, 2)


async def test_a_rejection_after_a_possible_charge_is_unknown() -> None:
    """M6: the 400 proves nothing about the submit before it."""
    with pytest.raises(SubmissionUnknown, match="It may have been charged") as caught:
        await submit(script(rejected(500), rejected(400)))
    assert caught.value.possible_duplicates == 0


@pytest.mark.parametrize("status", [408, 421, 425])
async def test_a_request_that_was_not_processed_is_resubmitted_once_and_counted(status: int) -> None:
    """M4: gateways send these statuses after the work was begun, too."""
    unprocessed = response(status, body=b"")
    assert (await submit(script(unprocessed, accepted()))).possible_duplicates == 1
    transport = script(unprocessed)
    with pytest.raises(SubmissionUnknown, match="2 submits may each have been charged") as caught:
        await submit(transport)
    assert (submits(transport.requests), caught.value.possible_duplicates) == (2, 1)


@pytest.mark.parametrize("status", [408, 421, 425])
async def test_a_request_that_the_service_did_not_process_is_unknown_at_once(status: int) -> None:
    """M4: its own JSON proves that the request had arrived. Under `never`, nothing is resubmitted."""
    for step, resubmit in ((rejected(status), "api-5xx"), (response(status, body=b""), "never")):
        transport = script(step)
        with pytest.raises(SubmissionUnknown):
            await submit(transport, resubmit=resubmit)  # type: ignore[arg-type]
        assert submits(transport.requests) == 1


async def test_a_failed_connection_after_a_resubmit_is_unknown() -> None:
    """The first submit may have been charged, so the whole submit is unknown."""
    with pytest.raises(SubmissionUnknown, match="It may have been charged") as caught:
        await submit(script(rejected(500), lost(Phase.CONNECT)))
    assert caught.value.possible_duplicates == 0


async def test_an_unknown_submit_says_what_is_known_and_what_to_do() -> None:
    """The error contains the status, an excerpt, and how to find out about the charge."""
    with pytest.raises(SubmissionUnknown, match=r"HTTP 502 Bad gateway.*balance.*charge you twice") as caught:
        await submit(script(HTML))
    assert caught.value.status == 502


async def test_a_429_is_a_wait_and_no_failure() -> None:
    """It is proven not charged, so it is sent again after the wait, however often, and counts as no attempt."""
    transport = script(*[rejected(429, retry_after="7")] * 20, rejected(500), rejected(429), accepted("ta-9"))
    assert await submit(transport) == AcceptedSubmit("ta-9", 1)
    assert all(later - earlier >= 7 for earlier, later in pairwise(transport.times_s[:20]))


async def test_a_429_with_a_long_wait_pauses_all_submits() -> None:
    """A short one delays only the submit that received it."""
    for asked, is_paused in (("60", True), ("3", False)):
        transport = script(rejected(429, retry_after=asked), accepted())
        async with running(transport) as api, anyio.create_task_group() as group:
            group.start_soon(api.submit)
            await anyio.sleep(0.5)
            began_s = anyio.current_time()
            await api.submit()
            assert (anyio.current_time() - began_s > 50) is is_paused


async def test_a_throttled_submit_gives_back_its_slot_and_keeps_its_place() -> None:
    """Others go on while it waits, and after the wait it comes before those that arrived later."""
    order: list[int] = []

    async def respond(request: WireRequest) -> WireResponse:
        number = int(json.loads(request.body or b"")["prompt"])
        order.append(number)
        await anyio.sleep(1)
        return (
            rejected(429, retry_after="1.5") if order.count(number) == 1 and number == 0 else accepted(f"ta-{number}")
        )

    async with running(script(respond), limits=Limits(max_submits=1)) as api, anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(api.submit_prompt, str(number))
            await anyio.sleep(0.01)
    assert order == [0, 1, 2, 0, 3, 4, 5]


async def test_a_wait_that_exceeds_the_time_left_is_raised_at_once() -> None:
    """If the wait would pass the deadline, the error is raised at once and contains the wait."""
    async with running(script(rejected(429, retry_after="200"))) as api:
        start_s = anyio.current_time()
        with pytest.raises(RateLimited) as caught:
            await api.submit(deadline_s=start_s + 100)
        assert anyio.current_time() - start_s < 1
        assert caught.value.retry_after_s == 200


async def test_a_429_after_a_possible_charge_is_still_unknown_at_the_deadline() -> None:
    """The 500 before it may have been charged."""
    async with running(script(rejected(500), rejected(429, retry_after="200"))) as api:
        with pytest.raises(SubmissionUnknown):
            await api.submit(deadline_s=anyio.current_time() + 100)


async def test_what_happens_during_the_wait_of_a_429_hides_no_possible_charge() -> None:
    """The client is closed, or the key is refused, while the submit waits after a 500 that may have been charged."""
    for is_doubted in (True, False):
        first = [rejected(500)] if is_doubted else []
        async with running(script(*first, rejected(429, retry_after="5"))) as api:

            async def close(api: Service = api) -> None:
                await anyio.sleep(4)
                await api.background.aclose(drain_s=0)

            with pytest.raises(SubmissionUnknown if is_doubted else ClientClosed):  # noqa: PT012 - the group re-raises
                async with anyio.create_task_group() as group:
                    group.start_soon(close)
                    try:
                        await api.submit()
                    except NanoBananaError as exc:
                        error = exc
                raise error


async def test_a_slot_acquired_too_late_does_not_hide_the_service_error() -> None:
    """If the loop stalls past the deadline, the service's last error is still raised."""
    transport = script(rejected(429, retry_after="7"))
    async with running(transport) as api, anyio.create_task_group() as group:

        async def stall() -> None:
            await anyio.sleep(5)
            jump(20)

        group.start_soon(stall)
        with pytest.raises(RateLimited):
            await api.submit(deadline_s=anyio.current_time() + 10)
    assert len(transport.times_s) == 1


async def test_submits_in_flight_are_bounded() -> None:
    """The number of submits in flight never exceeds the limit, for any number of callers."""

    async def slow(_: WireRequest) -> WireResponse:
        await anyio.sleep(1)
        return accepted()

    transport = script(slow)
    limits = Limits(max_submits=3, requests_per_s=1000, burst=100)
    async with running(transport, limits=limits) as api, anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(api.submit)
    assert (transport.most_in_flight, submits(transport.requests)) == (3, 20)


def slow_response(seconds: float) -> Callable[[WireRequest], Awaitable[WireResponse]]:
    """Return a step that waits and then accepts."""

    async def step(_: WireRequest) -> WireResponse:
        await anyio.sleep(seconds)
        return accepted("ta-late")

    return step


async def test_cancelling_the_caller_does_not_interrupt_a_post(caplog: pytest.LogCaptureFixture) -> None:
    """The POST runs to its end, and its task id is logged."""
    transport = script(slow_response(5))
    async with running(transport) as api:
        with anyio.move_on_after(1):
            await api.submit()
        assert transport.in_flight == 1
        await anyio.sleep(10)
        assert transport.in_flight == 0
    assert "ta-late" in caplog.text


async def test_cancelling_a_queued_submit_costs_nothing() -> None:
    """Until the POST begins, cancelling is free and gives the slot back."""
    transport = script(slow_response(5))
    async with running(transport, limits=Limits(max_submits=1)) as api:
        async with anyio.create_task_group() as group:
            group.start_soon(api.submit)
            await anyio.sleep(1)
            with anyio.move_on_after(1):
                await api.submit()
        assert submits(transport.requests) == 1
        await api.submit()


async def test_a_timeout_in_the_queue_says_that_nothing_was_sent() -> None:
    """The caller's deadline passed before it had a slot."""
    async with (
        running(script(slow_response(50)), limits=Limits(max_submits=1)) as api,
        anyio.create_task_group() as group,
    ):
        group.start_soon(api.submit)
        await anyio.sleep(1)
        with pytest.raises(NotSent, match="nothing was sent"):
            await api.submit(deadline_s=anyio.current_time() + 2)
        group.cancel_scope.cancel()


async def test_n2_a_timeout_during_a_post_waits_for_its_response() -> None:
    """N2: the task may be charged, and its id is in the response. `Timeouts.submit_s` bounds the wait."""
    async with running(script(slow_response(5))) as api:
        assert (await api.submit(deadline_s=anyio.current_time() + 1)).task_id == "ta-late"


async def test_n6_a_record_that_hangs_ends_the_submit_before_it_is_sent() -> None:
    """N6: a ledger of the application may wait for its database without end."""

    class Hanging(NoRecord):
        ends: tuple[AttemptEnd, ...] = ()

        async def begin_attempt(self, _: str | None) -> None:
            await anyio.sleep_forever()

        async def end_attempt(self, end: AttemptEnd) -> None:
            self.ends += (end,)

    record, transport = Hanging(), script(accepted())
    async with running(transport) as api:
        with pytest.raises(NotSent, match="was not recorded within 60 s"):
            await api.submit(record=record)
    assert transport.requests == []
    assert [end.verdict for end in record.ends] == [Verdict.NOT_CHARGED]


async def test_closing_waits_for_a_post_in_flight() -> None:
    """The caller gets its task id although the client is being closed."""
    api = service_over(script(slow_response(5)))
    ids = []

    async def caller() -> None:
        ids.append((await api.submit()).task_id)

    async with anyio.create_task_group() as group:
        group.start_soon(caller)
        await anyio.sleep(1)
        await api.background.aclose(drain_s=60)
    assert ids == ["ta-late"]


async def test_closing_waits_for_a_bounded_time() -> None:
    """A submit that has not ended by then is unknown."""
    api = service_over(script(slow_response(500)))
    errors: list[NanoBananaError] = []

    async def caller() -> None:
        try:
            await api.submit()
        except NanoBananaError as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(caller)
        await anyio.sleep(1)
        await api.background.aclose(drain_s=3)
    assert [type(error) for error in errors] == [SubmissionUnknown]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lost(Phase.CONNECT), id="never-connected"),
        pytest.param(lost(Phase.SEND), id="no-response"),
        pytest.param(lost(Phase.RESPONSE, partial=response(body=b"{")), id="cut"),
        pytest.param(response(200, body=b"<html>"), id="html"),
        pytest.param(rejected(429, retry_after="1"), id="429"),
        pytest.param(rejected(500), id="500"),
        pytest.param(HTML, id="502"),
    ],
)
async def test_a_query_is_retried_after_every_transient_error(step: Step) -> None:
    """A GET costs nothing, so it is retried."""
    async with running(script(step, step, finished())) as api:
        assert (await api.query("ta-1")).is_final


@pytest.mark.parametrize(
    ("step", "error"),
    [
        pytest.param(lost(Phase.CONNECT), NotSent, id="never-connected"),
        pytest.param(lost(Phase.SEND), TransportError, id="no-response"),
        pytest.param(response(200, body=b"<html>"), ProtocolError, id="html"),
        pytest.param(HTML, ServiceUnavailable, id="502"),
    ],
)
async def test_a_query_that_keeps_failing_raises_its_last_error(step: Step, error: type[NanoBananaError]) -> None:
    """After three attempts the last error is raised."""
    transport = script(step)
    async with running(transport) as api:
        with pytest.raises(error):
            await api.query("ta-1")
    assert len(transport.requests) == 3


async def test_the_retry_quota_bounds_traffic_in_an_outage() -> None:
    """The quota allows a few retries; after that each request is sent once."""
    transport = script(lost(Phase.CONNECT))
    async with running(transport) as api:
        for _ in range(200):
            with pytest.raises(NotSent):
                await api.query("ta-1")
    assert len(transport.requests) < 1.15 * 200


async def test_every_operation_ends_by_its_deadline() -> None:
    """Every operation ends in time, even if the transport is slow and every response asks to wait."""
    async with running(script(rejected(503, retry_after="15")), timeouts=Timeouts(query_s=20)) as api:
        start_s = anyio.current_time()
        with pytest.raises(NanoBananaError):
            await api.balance()
        assert anyio.current_time() - start_s <= 21


async def test_an_odd_acceptance_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A task id beside an error code is charged, so it is accepted with a warning."""
    caplog.set_level(logging.WARNING, "nanobanana_async")
    transport = script(response(200, {"code": 1, "message": "hm", "data": {"task_id": "ta-odd"}}))
    assert (await submit(transport)).task_id == "ta-odd"
    assert "ta-odd" in caplog.text


@pytest.mark.parametrize("step", [rejected(401, 401), rejected(402), rejected(400, 1, "insufficient balance")])
async def test_a_definite_rejection_opens_the_breaker(step: WireResponse) -> None:
    """After a revoked key or an empty account, submits in flight finish and others are refused without being sent."""
    transport = script(step)
    async with running(transport, limits=Limits(max_submits=4)) as api:
        errors: list[type[Exception]] = []

        async def one() -> None:
            try:
                await api.submit()
            except NanoBananaError as exc:
                errors.append(type(exc))

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(one)
    assert len(errors) == 50
    assert len(set(errors)) == 1
    assert submits(transport.requests) <= 4


async def test_an_open_breaker_probes_every_half_minute_and_recovers() -> None:
    """After a top-up, the next probe is accepted and closes the breaker without a restart."""
    transport = script(rejected(402), rejected(402), accepted())
    async with running(transport) as api:
        for interval_s, posts in ((0, 1), (1, 1), (30, 2), (1, 2)):
            await anyio.sleep(interval_s)
            with pytest.raises(InsufficientCredits):
                await api.submit()
            assert submits(transport.requests) == posts
        await anyio.sleep(30)
        for _ in range(3):
            assert (await api.submit()).task_id == "ta-1"


async def test_polls_continue_while_the_breaker_is_open() -> None:
    """Charged images are still delivered."""
    async with running(script(rejected(402), finished())) as api:
        with pytest.raises(InsufficientCredits):
            await api.submit()
        assert (await api.query("ta-1")).is_final


async def test_an_unexpected_transport_exception_leaves_the_submit_unknown() -> None:
    """Whatever the exception, the submit may have been charged."""

    async def broken(_: WireRequest) -> WireResponse:
        raise RuntimeError("boom")

    with pytest.raises(SubmissionUnknown, match="RuntimeError: boom"):
        await submit(script(broken))


async def test_a_resubmit_that_began_in_time_is_waited_for() -> None:
    """The service's 500 may have been charged, which is counted."""
    async with running(script(rejected(500), slow_response(50)), limits=Limits(max_submits=1, burst=1)) as api:
        assert (await api.submit(deadline_s=anyio.current_time() + 3)).possible_duplicates == 1


async def test_a_submit_interrupted_by_closing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the submit even if no caller is left."""
    api = service_over(script(slow_response(500)))
    with anyio.move_on_after(1):
        await api.submit()
    await api.background.aclose(drain_s=1)
    assert "may have been charged" in caplog.text


async def test_a_submit_cancelled_between_two_attempts_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The first attempt may have been charged, and the log is its only record."""
    async with running(script(rejected(500)), limits=Limits(requests_per_s=0.1, burst=1)) as api:
        with anyio.move_on_after(5):
            await api.submit()
    assert "cancelled between two attempts; the last one ended with: submit outcome unknown: HTTP 500 no" in caplog.text


async def test_closing_between_two_attempts_raises_the_last_error() -> None:
    """The error is that of the last attempt, not that the client is closed."""
    api = service_over(script(rejected(500)), limits=Limits(requests_per_s=0.1, burst=1))
    errors: list[type[NanoBananaError]] = []

    async def caller() -> None:
        try:
            await api.submit()
        except NanoBananaError as exc:
            errors.append(type(exc))

    async with anyio.create_task_group() as group:
        group.start_soon(caller)
        await anyio.sleep(5)
        await api.background.aclose(drain_s=1)
    assert errors == [SubmissionUnknown]


# --- the record of a submit -----------------------------------------------------------------------------------------


@attrs.define
class ListRecord:
    """A record in memory that may fail, or take a while, at one step."""

    steps: list[str] = attrs.field(factory=list)
    is_doubted: bool = False
    fails_at: str = ""
    takes_s: float = 0.0

    async def begin_attempt(self, nonce: str | None) -> None:
        """Record the beginning."""
        await self._record("begin")

    async def end_attempt(self, end: AttemptEnd) -> None:
        """Record the verdict."""
        await self._record(end.verdict.value)

    async def _record(self, step: str) -> None:
        await anyio.sleep(self.takes_s)
        self.steps.append(step)
        if step == self.fails_at:
            raise LedgerError(step)


async def test_each_post_is_recorded_before_it_leaves_and_after_it_has_ended() -> None:
    """A resubmit is a record of its own."""
    record = ListRecord()
    transport = script(lost(Phase.CONNECT), rejected(500), accepted())
    async with running(transport) as api:
        await api.submit(record=record)
    assert record.steps == ["begin", "not charged", "begin", "unknown", "begin", "accepted"]
    assert submits(transport.requests) == 3


@pytest.mark.parametrize(("step", "posts"), [("begin", 0), ("accepted", 1)])
async def test_what_a_record_raises_ends_the_call_and_gives_the_slot_back(step: str, posts: int) -> None:
    """If the beginning cannot be recorded, nothing is sent."""
    transport = script(accepted())
    async with running(transport, limits=Limits(max_submits=1)) as api:
        for _ in range(3):
            with pytest.raises(LedgerError, match=step):
                await api.submit(record=ListRecord(fails_at=step))
        assert submits(transport.requests) == 3 * posts
        assert (await api.submit()).task_id == "ta-1"


async def test_a_cancelled_caller_leaves_a_complete_record() -> None:
    """Its POST runs to its end, and so does the record of it."""
    record = ListRecord()
    async with running(script(slow_response(5))) as api:
        with anyio.move_on_after(1):
            await api.submit(record=record)
        assert record.steps == ["begin"]
        await anyio.sleep(10)
    assert record.steps == ["begin", "accepted"]


async def test_a_client_that_is_closed_while_an_attempt_is_recorded_sends_nothing() -> None:
    """The record ends with what is proven: nothing was charged."""
    record, transport = ListRecord(takes_s=1.0), script(accepted())
    api = service_over(transport)

    async def caller() -> None:
        with pytest.raises(NotSent):
            await api.submit(record=record)

    async with anyio.create_task_group() as group:
        group.start_soon(caller)
        await anyio.sleep(0.5)
        await api.background.aclose(drain_s=1)
    assert record.steps == ["begin", Verdict.NOT_CHARGED.value]
    assert submits(transport.requests) == 0


async def test_a_request_that_was_doubted_before_is_not_excused_again() -> None:
    """M4, M9: once per key over all attempts, in any run."""
    for step in (response(408, body=b""), response(302, body=b"", location="https://b.example")):
        transport = script(step)
        async with running(transport) as api:
            with pytest.raises(SubmissionUnknown):
                await api.submit(record=ListRecord(is_doubted=True))
        assert submits(transport.requests) == 1


async def _query(api: Service, task_id: str) -> None:
    await api.query(task_id)


@pytest.mark.parametrize("states_length", [True, False])
async def test_t2_responses_with_inline_images_wait_for_memory(states_length: bool) -> None:  # noqa: FBT001 - a table
    """T2: sixty images of 6 MB took 756 MB. As many are received at once as the bound allows."""
    at_once: list[int] = []
    in_memory = 0

    async def respond(request: WireRequest) -> WireResponse:
        nonlocal in_memory
        head = {"content-length": str(6 * 2**20)} if states_length else {"content-length": str(request.max_bytes)}
        assert request.before_body is not None
        await request.before_body(WireResponse(status=200, headers=head))
        in_memory += 1
        at_once.append(in_memory)
        await anyio.sleep(1)
        in_memory -= 1
        return finished(request.url.partition("task_id=")[2])

    limits = Limits(max_download_bytes=60 * 2**20)
    async with running(script(respond), limits=limits) as api, anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(_query, api, f"ta-{number}")
    assert max(at_once) == (2 if states_length else 1)


async def test_n1_an_id_of_the_request_itself_is_no_task() -> None:
    """A response that quotes the request contains what the application has put into `extra`."""
    request = GenerationRequest("a fox", extra={"previous": {"task_id": "ta-earlier"}})
    quoting = response(200, {"code": 0, "request": {"previous": {"task_id": "ta-earlier"}}})
    async with running(script(quoting)) as api:
        with pytest.raises(SubmissionUnknown):
            await api.submit(request=request)


async def test_a_body_that_cannot_be_redacted_loses_no_id() -> None:
    """A character reference of thousands of digits makes the HTML decoder of Python raise."""
    body = {"code": 0, "data": {"task_id": "ta-7"}, "echo": "&#" + "1" * 5000}
    assert (await submit(script(response(200, body)))).task_id == "ta-7"
