"""Callbacks: who may post them, and what they change. The tests call the receiver as an ASGI server does."""

import base64
import gzip
import hmac
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import (
    Batch,
    CallbackReceiver,
    ConfigurationError,
    NanoBananaClient,
    PollPolicy,
    ProtocolError,
    RetryPolicy,
    SqliteLedger,
    SubmissionUnknown,
    Succeeded,
    TaskHandle,
    TaskStatus,
    Timeouts,
    Unknown,
    WireRequest,
    WireResponse,
    parse_callback,
)
from nanobanana_async.callbacks import Message, Scope
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from tests.fakes import lost, rejected

pytestmark = pytest.mark.anyio

SECRET = "a secret of more than sixteen bytes"
PUBLIC = "https://app.example/nb"


def receiver_of(client: NanoBananaClient, **options: object) -> CallbackReceiver:
    """Return a receiver."""
    settings = {"public_url": PUBLIC, "secret": SECRET, **options}
    return CallbackReceiver(client, **settings)  # type: ignore[arg-type]


def body_for(task_id: str, status: str = "success", **fields: object) -> bytes:
    """Return the body of a callback."""
    return json.dumps({"task_id": task_id, "status": status, "result": None, **fields}).encode()


@attrs.define
class Posted:
    """One request as an ASGI server passes it on."""

    path: str
    body: bytes = b""
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    chunk_bytes: int = 2**16
    interval_s: float = 0.0
    ends: bool = True

    async def to(self, app: CallbackReceiver) -> int:
        """Post the request, and return the status of the response."""
        chunks = [self.body[at : at + self.chunk_bytes] for at in range(0, len(self.body), self.chunk_bytes)] or [b""]
        statuses: list[int] = []

        async def receive() -> Message:
            await anyio.sleep(self.interval_s)
            if not chunks:
                return {"type": "http.disconnect"}
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks) or not self.ends}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope: Scope = {"type": "http", "method": self.method, "path": self.path, "headers": list(self.headers)}
        await app(scope, receive, send)
        (status,) = statuses
        return status


def path_of(url: str) -> str:
    """Return the path of a callback URL."""
    return url.removeprefix("https://app.example")


# --- verification ---------------------------------------------------------------------------------------------------


async def test_each_submit_has_an_unguessable_path_of_its_own() -> None:
    """A path has 128 random bits and a 128-bit signature that every worker with the secret can verify."""
    async with Simulator(FAST_PROFILE).client() as client:
        urls = {receiver_of(client).register().url for _ in range(100)}
        assert len(urls) == 100
        assert all(url.startswith(f"{PUBLIC}/") and len(url) == len(PUBLIC) + 45 for url in urls)
        assert all(receiver_of(client).verify(path_of(url)) for url in urls)
        assert SECRET not in repr(receiver_of(client))


async def test_a_secret_may_be_changed_while_callbacks_are_pending() -> None:
    """The previous secret is accepted as long as it is passed."""
    async with Simulator(FAST_PROFILE).client() as client:
        old = receiver_of(client).register()
        new = receiver_of(client, secret="another secret of this app", previous_secret=SECRET)
        assert new.verify(old.url) == old.nonce
        assert new.verify(new.register().url)
        assert receiver_of(client, secret="another secret of this app").verify(old.url) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"secret": "short"}, "secret: expected at least 16 bytes"),
        ({"previous_secret": b""}, "secret: expected at least 16 bytes"),
        ({"public_url": "app.example/nb"}, "public_url"),
    ],
)
async def test_unsafe_receiver_settings_are_rejected(options: dict[str, object], says: str) -> None:
    """The error is raised on construction and does not contain the secret."""
    async with Simulator(FAST_PROFILE).client() as client:
        with pytest.raises(ConfigurationError, match=says):
            receiver_of(client, **options)


@given(st.text(max_size=200) | st.text(alphabet="ABCDEFabcdef0123456789-_", min_size=40, max_size=48))
def test_no_invented_path_is_accepted(path: str) -> None:
    """No path without a valid signature is accepted."""
    receiver = receiver_of(NanoBananaClient("dk-test"))
    assert receiver.verify(path) is None
    assert receiver.verify(f"/nb/{receiver.register().nonce}{path[:22]}") is None


@pytest.mark.parametrize(
    ("change", "status"),
    [
        pytest.param({}, 204, id="as-it-should-be"),
        pytest.param({"method": "GET"}, 405, id="get"),
        pytest.param({"path": "/nb/"}, 404, id="no-token"),
        pytest.param({"path": "/nb/" + "x" * 44}, 404, id="forged"),
        pytest.param({"body": b"not JSON"}, 204, id="unreadable"),
        pytest.param({"body": b""}, 204, id="empty"),
        pytest.param({"body": b"[" * 200_000}, 204, id="nested"),
        pytest.param({"body": body_for("ta-another")}, 404, id="another-tasks-id"),
        pytest.param({"body": b" " * (2**20 + 1)}, 413, id="too-long"),
        pytest.param({"body": b"x" * 100, "ends": False}, 400, id="gone-half-way"),
        pytest.param({"headers": ((b"content-type", b"text/html"),)}, 204, id="any-content-type"),
    ],
)
async def test_responses_to_posts_reveal_nothing(change: dict[str, Any], status: int) -> None:
    """A bad token gets the same 404 as any other path, and everything posted to a valid path is accepted."""
    simulator = Simulator(SimulatorProfile(median_s=30, visibility_delay_s=0))
    async with simulator.client() as client:
        receiver = receiver_of(client)
        handle = await client.submit("a fox", callback=receiver)
        url = simulator.service.tasks[handle.task_id].callback_url
        posted = Posted(path_of(url or ""), body_for(handle.task_id))
        assert await attrs.evolve(posted, **change).to(receiver) == status


@pytest.mark.virtual_time
async def test_a_slow_body_times_out() -> None:
    """A body has ten seconds in total."""
    async with Simulator(FAST_PROFILE).client() as client:
        receiver = receiver_of(client)
        posted = Posted(path_of(receiver.register().url), b"x" * 100, chunk_bytes=1, interval_s=1)
        began_s = anyio.current_time()
        assert await posted.to(receiver) == 408
        assert anyio.current_time() - began_s == pytest.approx(10)


async def test_a_compressed_body_is_read_up_to_the_limit() -> None:
    """A decompression bomb cannot be decoded, and still triggers a query."""
    assert parse_callback(gzip.compress(body_for("ta-1")), content_encoding="gzip").task_id == "ta-1"
    with pytest.raises(ProtocolError):
        parse_callback(gzip.compress(b" " * 2**26), content_encoding="gzip")


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_body_is_a_payload_or_a_protocol_error(body: bytes) -> None:
    """`parse_callback` returns a payload or raises `ProtocolError`."""
    try:
        payload = parse_callback(body)
    except ProtocolError:
        return
    assert payload.task_id


def test_a_payload_contains_what_was_posted() -> None:
    """The payload has the task id, the status and the whole body."""
    payload = parse_callback(body_for("ta-1", "FAILED", consumed="0.5", status_reason={"message": "no"}))
    assert (payload.task_id, payload.status, payload.raw["consumed"]) == ("ta-1", TaskStatus.FAILED, "0.5")


# --- effects --------------------------------------------------------------------------------------------------------


@attrs.define
class CallbackSimulator:
    """A simulator whose callbacks the test posts."""

    simulator: Simulator
    client: NanoBananaClient
    receiver: CallbackReceiver
    earlier_queries: int = 0

    async def trust(self) -> None:
        """Let one callback come, so that polls are rare from now on."""
        handle = await self.client.submit("a fox", callback=self.receiver)
        async with anyio.create_task_group() as group:
            group.start_soon(handle.wait)
            await anyio.sleep(20.1)
            await self.call(handle.task_id)
        self.earlier_queries = self.queries()

    async def call(self, task_id: str, **change: Any) -> int:  # noqa: ANN401 - of `Posted`
        """Post the callback of one task."""
        url = self.simulator.service.tasks[task_id].callback_url
        return await attrs.evolve(Posted(path_of(url or ""), body_for(task_id)), **change).to(self.receiver)

    def queries(self) -> int:
        """Return the number of queries so far."""
        return self.simulator.service.requests.count("GET /api/task/query") - self.earlier_queries


@asynccontextmanager
async def callback_simulator() -> AsyncIterator[CallbackSimulator]:
    """Run a client with the default schedule against a simulated service."""
    simulator = Simulator(SimulatorProfile(median_s=20, sigma=0, visibility_delay_s=0))
    async with simulator.client(polling=PollPolicy()) as client:
        yield CallbackSimulator(simulator, client, receiver_of(client))


@pytest.mark.virtual_time
async def test_a_callback_ends_the_wait_with_one_query() -> None:
    """A callback triggers one query at once, without a poll before it."""
    async with callback_simulator() as service:
        await service.trust()
        handle = await service.client.submit("a fox", callback=service.receiver)
        ends: list[float] = []

        async def wait() -> None:
            await handle.wait()
            ends.append(anyio.current_time())

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(20.5)
            called_s = anyio.current_time()
            assert await service.call(handle.task_id) == 204
        assert ends[0] - called_s < 0.3
        assert service.queries() == 1


@pytest.mark.virtual_time
async def test_a_missing_callback_only_costs_time() -> None:
    """Polling finds the result, and after three missed callbacks polls are as frequent as without."""
    async with callback_simulator() as service:
        await service.trust()
        delays = []
        for _ in range(5):
            handle = await service.client.submit("a fox", callback=service.receiver)
            began_s = anyio.current_time()
            await handle.wait()
            delays.append(anyio.current_time() - began_s - 20)
        assert all(30 < delay < 50 for delay in delays[:3])
        assert all(delay < 8 for delay in delays[3:])


@pytest.mark.virtual_time
async def test_f1_callbacks_that_never_came_cost_no_time_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """F1: a wrong URL made each image a minute late, without a word. The warning names the URL, once."""
    async with callback_simulator() as service:
        for _ in range(6):
            handle = await service.client.submit("a fox", callback=service.receiver)
            began_s = anyio.current_time()
            await handle.wait()
            assert anyio.current_time() - began_s < 28
    assert caplog.text.count("no callback came for the last 3 tasks") == 1
    assert f"Check that {PUBLIC} can be reached from the internet" in caplog.text


@pytest.mark.virtual_time
async def test_the_status_in_a_callback_is_ignored() -> None:
    """A false success or failure has no effect: the query decides."""
    async with callback_simulator() as service:
        handle = await service.client.submit("a fox", callback=service.receiver)
        async with anyio.create_task_group() as group:
            group.start_soon(handle.wait)
            await anyio.sleep(1)
            await service.call(handle.task_id, body=body_for(handle.task_id, "failed"))
            await anyio.sleep(1)
            assert (await handle.query()).status is TaskStatus.SUBMITTED
            assert service.queries() == 2
        assert (await handle.result()).images


@pytest.mark.virtual_time
async def test_a_thousand_replays_trigger_one_query_in_ten_seconds() -> None:
    """Duplicates get a 2xx and change nothing."""
    async with callback_simulator() as service:
        handle = await service.client.submit("a fox", callback=service.receiver)
        async with anyio.create_task_group() as group:
            group.start_soon(handle.wait)
            await anyio.sleep(0.1)
            statuses = [await service.call(handle.task_id) for _ in range(1000)]
            await anyio.sleep(9)
            assert service.queries() <= 1
            group.cancel_scope.cancel()
        assert set(statuses) == {204}


@pytest.mark.virtual_time
async def test_a_late_callback_is_a_no_op() -> None:
    """A callback after the poll that found the result has no effect."""
    async with callback_simulator() as service:
        handle = await service.client.submit("a fox", callback=service.receiver)
        await handle.wait()
        queries = service.queries()
        assert await service.call(handle.task_id) == 204
        await anyio.sleep(30)
        assert service.queries() == queries


@pytest.mark.virtual_time
async def test_an_early_callback_is_remembered_until_there_is_a_waiter() -> None:
    """A callback may arrive before the submit's response, or before the first wait."""
    profile = SimulatorProfile(median_s=0.5, sigma=0, visibility_delay_s=0)
    simulator = Simulator(profile, delay_s=4.0)
    async with simulator.client(polling=PollPolicy()) as client:
        service = CallbackSimulator(simulator, client, receiver_of(client))
        handles = []

        async def submit() -> None:
            handles.append(await client.submit("a fox", callback=service.receiver))

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            await anyio.sleep(3)
            assert await service.call(simulator.charges[0].task_id) == 204
        began_s = anyio.current_time()
        await handles[0].wait()
        assert anyio.current_time() - began_s < 5
        handle = await client.submit("a hare", callback=service.receiver)
        await anyio.sleep(1)
        await service.call(handle.task_id)
        began_s = anyio.current_time()
        await handle.wait()
        assert anyio.current_time() - began_s < 5


# --- other workers --------------------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_a_worker_that_does_not_know_the_task_forwards_the_callback() -> None:
    """The worker responds with a 2xx, and the worker with the waiter sends a query."""
    async with callback_simulator() as service:
        forwarded: list[tuple[str, bytes]] = []

        async def forward(token: str, body: bytes) -> None:
            forwarded.append((token, body))
            if len(forwarded) > 1:
                raise RuntimeError("the broker is down")

        await service.trust()
        other = receiver_of(service.client, forward=forward)
        handle = await service.client.submit("a fox", callback=service.receiver)
        url = service.simulator.service.tasks[handle.task_id].callback_url or ""
        async with anyio.create_task_group() as group:
            group.start_soon(handle.wait)
            await anyio.sleep(20.5)
            posted = Posted(path_of(url), body_for(handle.task_id))
            assert [await posted.to(other) for _ in range(2)] == [204, 204]
            assert await service.receiver.deliver(*forwarded[0])
        assert service.queries() == 1
        assert len(forwarded) == 2


async def test_t5_a_callback_is_forwarded_once() -> None:
    """T5: two workers that post to each other's path pass a callback around without end."""
    async with Simulator(FAST_PROFILE).client() as client:
        hops: list[str] = []

        async def forward(token: str, body: bytes) -> None:
            hops.append(token)
            if len(hops) < 9:
                assert await Posted(f"/nb/{token}", body).to(other) == 204

        one, other = receiver_of(client, forward=forward), receiver_of(client, forward=forward)
        path = path_of(receiver_of(client).register().url)
        assert await Posted(path, body_for("ta-1")).to(one) == 204
        assert len(hops) == 1
        assert one.verify(hops[0]) == one.verify(path)


async def test_g4_a_hundred_thousand_pending_callbacks_take_little_memory() -> None:
    """G4: 1,350 bytes each made 135 MB."""
    async with Simulator(FAST_PROFILE).client() as client:
        receiver = receiver_of(client)
        tracemalloc.start()
        try:
            kept = [receiver.register() for _ in range(2000)]
            taken = tracemalloc.get_traced_memory()[0] / len(kept)
        finally:
            tracemalloc.stop()
    assert taken < 600


# --- lost responses -------------------------------------------------------------------------------------------------


@attrs.define
class LosingTransport:
    """A transport that loses the responses to submits."""

    simulator: Simulator
    losing: bool = True

    async def send(self, request: WireRequest, **options: object) -> WireResponse:
        """Send as the simulator does, and lose the response."""
        response = await self.simulator.send(request, **options)  # type: ignore[arg-type]
        if request.method == "POST" and self.losing:
            raise lost()
        return response

    async def aclose(self) -> None:
        """Do nothing; nothing needs to be closed."""


@pytest.mark.virtual_time
async def test_a_submit_whose_response_was_lost_is_recovered_by_its_callback() -> None:
    """The caller gets its handle, and an id that the service does not know is ignored."""
    simulator = Simulator(SimulatorProfile(median_s=20, sigma=0, visibility_delay_s=0))
    async with NanoBananaClient("dk-test", transport=LosingTransport(simulator)) as client:
        service = CallbackSimulator(simulator, client, receiver_of(client))
        found: list[str] = []

        async def submit() -> None:
            found.append((await client.submit("a fox", callback=service.receiver)).task_id)

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            await anyio.sleep(1)
            task_id = simulator.charges[0].task_id
            await service.call(task_id, body=body_for("ta-invented"))
            await anyio.sleep(20)
            assert found == []
            await service.call(task_id)
        assert found == [task_id]
        assert (await client.task(task_id).result()).images


@pytest.mark.virtual_time
async def test_without_a_callback_in_time_the_submit_stays_unknown() -> None:
    """The wait ends after `Timeouts.recovery_s`."""
    timeouts = Timeouts(recovery_s=30)
    async with NanoBananaClient(
        "dk-test", transport=LosingTransport(Simulator(FAST_PROFILE)), timeouts=timeouts
    ) as client:
        began_s = anyio.current_time()
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", callback=receiver_of(client))
        assert anyio.current_time() - began_s == pytest.approx(30, abs=1)


@pytest.mark.parametrize("when", ["in-time", "after-a-restart"])
async def test_in_a_batch_a_callback_binds_the_task_id(tmp_path: Path, when: str) -> None:
    """The callback resolves the row in the same run or in a later one."""
    simulator = Simulator(FAST_PROFILE)
    transport = LosingTransport(simulator)
    recovery_s = 5.0 if when == "in-time" else 0.0

    def client() -> NanoBananaClient:
        return simulator.client(timeouts=Timeouts(recovery_s=recovery_s), wrap=lambda _: transport)

    async with client() as first, Batch.open(tmp_path, first, callback=(receiver := receiver_of(first))) as batch:
        service = CallbackSimulator(simulator, first, receiver)
        async with anyio.create_task_group() as group:
            if when == "in-time":
                group.start_soon(_call_when_charged, service)
            (outcome,) = [outcome async for outcome in batch.run(["a fox"])]
    assert isinstance(outcome, Succeeded if when == "in-time" else Unknown)
    transport.losing = False
    async with client() as second, Batch.open(tmp_path, second, callback=(receiver := receiver_of(second))) as batch:
        await CallbackSimulator(simulator, second, receiver).call(simulator.charges[0].task_id)
        (outcome,) = [outcome async for outcome in batch.run(["a fox"])]
    assert isinstance(outcome, Succeeded)
    assert outcome.task.task_id == simulator.charges[0].task_id
    assert len(simulator.charges) == 1
    assert receiver.unmatched_hooks == [second.on_unmatched_callback]


async def _call_when_charged(service: CallbackSimulator) -> None:
    while not service.simulator.charges:
        await anyio.sleep(0.01)
    await anyio.sleep(0.1)
    await service.call(service.simulator.charges[0].task_id)


def test_the_format_of_a_token_is_fixed() -> None:
    """A token is a nonce and 16 bytes of HMAC-SHA256 in URL-safe base64, which other languages can verify."""
    expected = receiver_of(NanoBananaClient("dk-test")).register()
    proof = hmac.digest(SECRET.encode(), expected.nonce.encode(), "sha256")[:16]
    assert expected.url == f"{PUBLIC}/{expected.nonce}{base64.urlsafe_b64encode(proof).decode().rstrip('=')}"


@attrs.define
class HiccupTransport:
    """A transport that loses the responses to submits, and answers the next queries with a 500."""

    inner: LosingTransport
    failing: int = 0

    async def send(self, request: WireRequest, **options: object) -> WireResponse:
        """Fail a query, or pass the request on."""
        if request.method == "GET" and self.failing:
            self.failing -= 1
            return rejected(500)
        return await self.inner.send(request, **options)

    async def aclose(self) -> None:
        """Do nothing; nothing needs to be closed."""


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_n3_a_callback_during_a_hiccup_of_the_service_is_confirmed_later(tmp_path: Path) -> None:
    """N3: the service repeats no callback that got a 204."""
    simulator = Simulator(FAST_PROFILE)
    hiccup = HiccupTransport(LosingTransport(simulator))
    async with (
        simulator.client(timeouts=Timeouts(recovery_s=0.0), wrap=lambda _: hiccup) as client,
        Batch.open(tmp_path, client, callback=(receiver := receiver_of(client))) as batch,
    ):
        _ = [outcome async for outcome in batch.run(["a fox"])]
        hiccup.failing = 20
        service = CallbackSimulator(simulator, client, receiver)
        assert await service.call(simulator.charges[0].task_id) == 204
        assert await service.call(simulator.charges[0].task_id) == 204
        assert len(await batch.unknown_rows()) == 1
        await anyio.sleep(700)
        assert await batch.unknown_rows() == []


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("has_ledger", [False, True])
async def test_a_callback_after_the_wait_for_it_becomes_an_orphan(tmp_path: Path, has_ledger: bool) -> None:  # noqa: FBT001 - a table
    """F1: `submit` does not block for minutes. The task is recorded and passed to `on_orphan`."""
    simulator, orphans = Simulator(FAST_PROFILE), list[TaskHandle]()
    transport = LosingTransport(simulator)
    ledger = SqliteLedger(tmp_path) if has_ledger else None
    async with NanoBananaClient("dk-test", transport=transport, on_orphan=orphans.append, ledger=ledger) as client:
        receiver = receiver_of(client)
        began_s = anyio.current_time()
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", callback=receiver, note="n")
        assert anyio.current_time() - began_s < 40
        await CallbackSimulator(simulator, client, receiver).call(simulator.charges[0].task_id)
        (handle,) = orphans
        assert handle.task_id == simulator.charges[0].task_id
        assert (await handle.result()).images
        if has_ledger:
            assert [resumed.note async for resumed in client.resume()] == ["n"]
            assert [attempt async for attempt in client.unresolved()] == []


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
async def test_a_callback_after_a_restart_binds_a_single_task(tmp_path: Path) -> None:
    """The nonce is in the ledger, so the program that has submitted need not be the one that gets the callback."""
    simulator = Simulator(FAST_PROFILE)
    transport = LosingTransport(simulator)
    timeouts = Timeouts(recovery_s=0.0)
    async with NanoBananaClient(
        "dk-test", transport=transport, timeouts=timeouts, ledger=SqliteLedger(tmp_path)
    ) as client:
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", callback=receiver_of(client), owner="u1", note={"channel": 7})
    orphans: list[TaskHandle] = []
    async with NanoBananaClient(
        "dk-test", transport=transport, on_orphan=orphans.append, ledger=SqliteLedger(tmp_path)
    ) as client:
        await CallbackSimulator(simulator, client, receiver_of(client)).call(simulator.charges[0].task_id)
        assert [(handle.task_id, handle.owner, handle.note) for handle in orphans] == [
            (simulator.charges[0].task_id, "u1", {"channel": 7})
        ]
        assert [handle.task_id async for handle in client.resume()] == [simulator.charges[0].task_id]


@pytest.mark.virtual_time
async def test_n4_the_callback_of_a_duplicate_keeps_its_id(caplog: pytest.LogCaptureFixture) -> None:
    """N4: the first POST was charged and answered with a 500, and its image is as good as the second."""
    profile = attrs.evolve(FAST_PROFILE, charged_errors=1.0)
    simulator, orphans = Simulator(profile), list[TaskHandle]()
    async with NanoBananaClient("dk-test", transport=simulator, on_orphan=orphans.append) as client:
        receiver = receiver_of(client)

        async def heal() -> None:
            while not simulator.charges:
                await anyio.sleep(0.001)
            simulator.service.profile = FAST_PROFILE

        async with anyio.create_task_group() as group:
            group.start_soon(heal)
            handle = await client.submit("a fox", callback=receiver)
        first, second = (charge.task_id for charge in simulator.charges)
        assert (handle.task_id, handle.possible_duplicates) == (second, 1)
        await CallbackSimulator(simulator, client, receiver).call(first)
        assert [orphan.task_id for orphan in orphans] == [first]
    assert f"task {first} is a charged duplicate of task {second}" in caplog.text


@pytest.mark.virtual_time
async def test_n4_callbacks_of_both_posts_during_the_second_lose_no_id() -> None:
    """Each names a charged task, and the submit takes one of them."""
    simulator, orphans = Simulator(FAST_PROFILE), list[TaskHandle]()
    transport = LosingTransport(simulator)
    retry, timeouts = RetryPolicy(resubmit="always", attempts=2), Timeouts(recovery_s=5)
    async with NanoBananaClient(
        "dk-test", transport=transport, on_orphan=orphans.append, retry=retry, timeouts=timeouts
    ) as client:
        service, handles = CallbackSimulator(simulator, client, receiver_of(client)), list[TaskHandle]()

        async def submit() -> None:
            handles.append(await client.submit("a fox", callback=service.receiver))

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            while len(simulator.charges) < 2:
                await anyio.sleep(0.001)
            for charge in simulator.charges:
                await service.call(charge.task_id)
    found = {handles[0].task_id, *(orphan.task_id for orphan in orphans)}
    assert found == {charge.task_id for charge in simulator.charges}


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("decision", ["abandon", "resubmit"])
async def test_n5_a_callback_after_a_decision_does_not_end_the_run(tmp_path: Path, decision: str) -> None:
    """N5: the image has come, which is better than what was decided without it."""
    simulator = Simulator(FAST_PROFILE)
    async with (
        simulator.client(timeouts=Timeouts(recovery_s=60.0), wrap=lambda _: LosingTransport(simulator)) as client,
        Batch.open(tmp_path, client, callback=(receiver := receiver_of(client)), group_commit_s=0) as batch,
    ):

        async def decide_and_call() -> None:
            while not (unknown := await batch.unknown_rows()):
                await anyio.sleep(0.1)
            await getattr(batch, decision)(unknown[0].key)
            await CallbackSimulator(simulator, client, receiver).call(simulator.charges[0].task_id)

        async with anyio.create_task_group() as group:
            group.start_soon(decide_and_call)
            outcomes = [outcome async for outcome in batch.run(["a fox"])]
    assert [type(outcome) for outcome in outcomes] == [Succeeded]
    assert len(simulator.charges) == 1
