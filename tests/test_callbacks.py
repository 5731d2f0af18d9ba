"""Callbacks: who may post, what it changes, and what it never changes. The receiver is played as ASGI servers do."""

import base64
import gzip
import hmac
import json
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
    SubmissionUnknown,
    Succeeded,
    TaskStatus,
    Timeouts,
    Unknown,
    WireRequest,
    WireResponse,
    parse_callback,
)
from nanobanana_async.callbacks import Message, Scope
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from tests.fakes import lost

pytestmark = pytest.mark.anyio

SECRET = "a secret of more than sixteen bytes"
PUBLIC = "https://app.example/nb"


def receiver_of(client: NanoBananaClient, **options: object) -> CallbackReceiver:
    """Return a receiver."""
    settings = {"public_url": PUBLIC, "secret": SECRET, **options}
    return CallbackReceiver(client, **settings)  # type: ignore[arg-type]


def body_for(task_id: str, status: str = "success", **fields: object) -> bytes:
    """Return what the service posts."""
    return json.dumps({"task_id": task_id, "status": status, "result": None, **fields}).encode()


@attrs.define
class Posted:
    """One request as an ASGI server hands it over."""

    path: str
    body: bytes = b""
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    chunk_bytes: int = 2**16
    interval_s: float = 0.0
    ends: bool = True

    async def to(self, app: CallbackReceiver) -> int:
        """Post it; return the status of the answer."""
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


# --- who may post ---------------------------------------------------------------------------------------------------


async def test_each_submit_has_a_path_of_its_own_that_nobody_can_guess() -> None:
    """128 bits of chance and 128 of proof; any worker with the secret can tell it from a forged one."""
    async with Simulator(FAST_PROFILE).client() as client:
        urls = {receiver_of(client).register().url for _ in range(100)}
        assert len(urls) == 100
        assert all(url.startswith(f"{PUBLIC}/") and len(url) == len(PUBLIC) + 45 for url in urls)
        assert all(receiver_of(client).verify(path_of(url)) for url in urls)
        assert SECRET not in repr(receiver_of(client))


async def test_a_secret_may_be_changed_while_callbacks_are_on_their_way() -> None:
    """The one before is accepted as long as it is given."""
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
async def test_what_would_not_be_safe_is_refused(options: dict[str, object], says: str) -> None:
    """When the receiver is made, and without the secret in the message."""
    async with Simulator(FAST_PROFILE).client() as client:
        with pytest.raises(ConfigurationError, match=says):
            receiver_of(client, **options)


@given(st.text(max_size=200) | st.text(alphabet="ABCDEFabcdef0123456789-_", min_size=40, max_size=48))
def test_no_invented_path_is_true(path: str) -> None:
    """Whatever it is made of."""
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
async def test_what_is_posted_is_answered_quickly_and_tells_nothing(change: dict[str, Any], status: int) -> None:
    """A bad token is a 404 like any other; whatever else comes to a true path is taken."""
    simulator = Simulator(SimulatorProfile(median_s=30, visibility_delay_s=0))
    async with simulator.client() as client:
        receiver = receiver_of(client)
        handle = await client.submit("a fox", callback=receiver)
        url = simulator.service.tasks[handle.task_id].callback_url
        posted = Posted(path_of(url or ""), body_for(handle.task_id))
        assert await attrs.evolve(posted, **change).to(receiver) == status


@pytest.mark.virtual_time
async def test_a_body_that_trickles_is_given_up() -> None:
    """Ten seconds in all."""
    async with Simulator(FAST_PROFILE).client() as client:
        receiver = receiver_of(client)
        posted = Posted(path_of(receiver.register().url), b"x" * 100, chunk_bytes=1, interval_s=1)
        began_s = anyio.current_time()
        assert await posted.to(receiver) == 408
        assert anyio.current_time() - began_s == pytest.approx(10)


async def test_a_compressed_body_is_read_up_to_the_cap() -> None:
    """A bomb is not: it counts as unreadable, and as the hint that it is."""
    assert parse_callback(gzip.compress(body_for("ta-1")), content_encoding="gzip").task_id == "ta-1"
    with pytest.raises(ProtocolError):
        parse_callback(gzip.compress(b" " * 2**26), content_encoding="gzip")


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_body_raises_anything_else(body: bytes) -> None:
    """A claim, or `ProtocolError`."""
    try:
        payload = parse_callback(body)
    except ProtocolError:
        return
    assert payload.task_id


def test_a_claim_is_what_the_body_says() -> None:
    """With everything that was posted."""
    payload = parse_callback(body_for("ta-1", "FAILED", consumed="0.5", status_reason={"message": "no"}))
    assert (payload.task_id, payload.status, payload.raw["consumed"]) == ("ta-1", TaskStatus.FAILED, "0.5")


# --- what it changes ------------------------------------------------------------------------------------------------


@attrs.define
class Calling:
    """A simulator that calls back, by hand: what comes, and when, is up to the test."""

    simulator: Simulator
    client: NanoBananaClient
    receiver: CallbackReceiver

    async def call(self, task_id: str, **change: Any) -> int:  # noqa: ANN401 - of `Posted`
        """Post the callback of one task."""
        url = self.simulator.service.tasks[task_id].callback_url
        return await attrs.evolve(Posted(path_of(url or ""), body_for(task_id)), **change).to(self.receiver)

    def queries(self) -> int:
        """Count the queries so far."""
        return self.simulator.service.requests.count("GET /api/task/query")


@asynccontextmanager
async def calling() -> AsyncIterator[Calling]:
    """Play the service, with the default schedule."""
    simulator = Simulator(SimulatorProfile(median_s=20, sigma=0, visibility_delay_s=0))
    async with simulator.client(polling=PollPolicy()) as client:
        yield Calling(simulator, client, receiver_of(client))


@pytest.mark.virtual_time
async def test_a_callback_ends_the_wait_with_one_query() -> None:
    """At once, and without a poll before it."""
    async with calling() as service:
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
async def test_a_callback_that_never_comes_costs_time_and_nothing_else() -> None:
    """The poll is the net; and after three that did not come, polls are as if none were expected."""
    async with calling() as service:
        delays = []
        for _ in range(5):
            handle = await service.client.submit("a fox", callback=service.receiver)
            began_s = anyio.current_time()
            await handle.wait()
            delays.append(anyio.current_time() - began_s - 20)
        assert all(30 < delay < 50 for delay in delays[:3])
        assert all(delay < 8 for delay in delays[3:])


@pytest.mark.virtual_time
async def test_what_a_callback_claims_is_not_believed() -> None:
    """A success that is none, a failure that is none: the query decides."""
    async with calling() as service:
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
async def test_a_thousand_replays_buy_one_query_in_ten_seconds() -> None:
    """F22, F24: duplicates are answered 2xx, and change nothing."""
    async with calling() as service:
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
    """The poll had seen it."""
    async with calling() as service:
        handle = await service.client.submit("a fox", callback=service.receiver)
        await handle.wait()
        queries = service.queries()
        assert await service.call(handle.task_id) == 204
        await anyio.sleep(30)
        assert service.queries() == queries


@pytest.mark.virtual_time
async def test_an_early_callback_is_remembered_until_somebody_waits() -> None:
    """Before the answer to the submit was read, or before anybody asked."""
    profile = SimulatorProfile(median_s=0.5, sigma=0, visibility_delay_s=0)
    simulator = Simulator(profile, delay_s=4.0)
    async with simulator.client(polling=PollPolicy()) as client:
        service = Calling(simulator, client, receiver_of(client))
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
async def test_a_worker_that_does_not_know_the_task_passes_the_news_on() -> None:
    """It answers 2xx; the worker that waits is told, and asks."""
    async with calling() as service:
        forwarded: list[tuple[str, bytes]] = []

        async def forward(token: str, body: bytes) -> None:
            forwarded.append((token, body))
            if len(forwarded) > 1:
                raise RuntimeError("the broker is down")

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


# --- what was lost --------------------------------------------------------------------------------------------------


@attrs.define
class Forgetful:
    """A transport whose answers to submits are lost on the way."""

    simulator: Simulator
    losing: bool = True

    async def send(self, request: WireRequest, **options: object) -> WireResponse:
        """Do as the simulator does, and lose the answer."""
        response = await self.simulator.send(request, **options)  # type: ignore[arg-type]
        if request.method == "POST" and self.losing:
            raise lost()
        return response

    async def aclose(self) -> None:
        """There is nothing to close."""


@pytest.mark.virtual_time
async def test_a_submit_whose_answer_was_lost_is_found_by_its_callback() -> None:
    """The caller gets its handle; a claim that the service does not know is not believed."""
    simulator = Simulator(SimulatorProfile(median_s=20, sigma=0, visibility_delay_s=0))
    async with NanoBananaClient("dk-test", transport=Forgetful(simulator)) as client:
        service = Calling(simulator, client, receiver_of(client))
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
async def test_without_a_callback_in_time_it_stays_unknown() -> None:
    """After `Timeouts.recovery_s`."""
    timeouts = Timeouts(recovery_s=30)
    async with NanoBananaClient("dk-test", transport=Forgetful(Simulator(FAST_PROFILE)), timeouts=timeouts) as client:
        began_s = anyio.current_time()
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", callback=receiver_of(client))
        assert anyio.current_time() - began_s == pytest.approx(30, abs=1)


@pytest.mark.parametrize("when", ["in-time", "after-a-restart"])
async def test_in_a_batch_the_ledger_binds_what_a_callback_tells(tmp_path: Path, when: str) -> None:
    """In the same run, or in any later one."""
    simulator = Simulator(FAST_PROFILE)
    transport = Forgetful(simulator)
    recovery_s = 5.0 if when == "in-time" else 0.0

    def client() -> NanoBananaClient:
        fast = simulator.client()
        fast._api._transport = transport
        fast.timeouts = attrs.evolve(fast.timeouts, recovery_s=recovery_s)  # type: ignore[misc]
        return fast

    async with client() as first, Batch.open(tmp_path, first, callback=(receiver := receiver_of(first))) as batch:
        service = Calling(simulator, first, receiver)
        async with anyio.create_task_group() as group:
            if when == "in-time":
                group.start_soon(_call_when_charged, service)
            (outcome,) = [outcome async for outcome in batch.run(["a fox"])]
    assert isinstance(outcome, Succeeded if when == "in-time" else Unknown)
    transport.losing = False
    async with client() as second, Batch.open(tmp_path, second, callback=(receiver := receiver_of(second))) as batch:
        await Calling(simulator, second, receiver).call(simulator.charges[0].task_id)
        (outcome,) = [outcome async for outcome in batch.run(["a fox"])]
    assert isinstance(outcome, Succeeded)
    assert outcome.task.task_id == simulator.charges[0].task_id
    assert len(simulator.charges) == 1
    assert receiver.unmatched_hooks == []


async def _call_when_charged(service: Calling) -> None:
    while not service.simulator.charges:
        await anyio.sleep(0.01)
    await anyio.sleep(0.1)
    await service.call(service.simulator.charges[0].task_id)


def test_a_token_is_the_same_wherever_it_is_made() -> None:
    """A program in another language can check it: nonce, then 16 bytes of HMAC-SHA256, both in URL-safe base64."""
    expected = receiver_of(NanoBananaClient("dk-test")).register()
    proof = hmac.digest(SECRET.encode(), expected.nonce.encode(), "sha256")[:16]
    assert expected.url == f"{PUBLIC}/{expected.nonce}{base64.urlsafe_b64encode(proof).decode().rstrip('=')}"
