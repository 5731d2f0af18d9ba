"""A user's transport that hangs, returns wrong values or raises anything affects only its own request."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import anyio
import pytest

from nanobanana_async import ExchangeError, NanoBananaClient, Phase, SubmissionUnknown, Timeouts, TransportError
from nanobanana_async.protocols import RequestKind, WireRequest, WireResponse
from nanobanana_async.simulator import FAST_PROFILE, Simulator
from nanobanana_async.transport.checked import CheckedTransport
from tests.fakes import accepted, finished

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

GET = WireRequest(kind=RequestKind.READ, method="GET", url="https://example.org/")


class Unprintable(Exception):
    """An exception whose `__str__` raises."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class MisbehavingTransport:
    """A transport whose behaviour is given."""

    def __init__(self, behave: Callable[[WireRequest], Awaitable[object]]) -> None:
        self._behave = behave

    async def send(self, request: WireRequest, **_: object) -> WireResponse:
        """Behave as given."""
        await anyio.lowlevel.checkpoint()
        return await self._behave(request)  # type: ignore[return-value]

    async def aclose(self) -> None:
        """Do nothing; nothing needs to be closed."""


async def _unprintable(_: WireRequest) -> object:
    raise Unprintable


async def _cancelled_inside(_: WireRequest) -> object:
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        raise ValueError("trio has no such accidents")
    inner = asyncio.get_running_loop().create_future()
    inner.cancel()
    return await inner


async def _nothing(_: WireRequest) -> object:
    return None


async def _text_for_status(_: WireRequest) -> object:
    return WireResponse(status="200")  # type: ignore[arg-type]


async def _number_for_header(_: WireRequest) -> object:
    return WireResponse(status=200, headers={"retry-after": 5})  # type: ignore[dict-item]


ODD = [_unprintable, _cancelled_inside, _nothing, _text_for_status, _number_for_header]


@pytest.mark.parametrize("behave", ODD)
async def test_any_transport_failure_is_an_exchange_error(
    behave: Callable[[WireRequest], Awaitable[object]],
) -> None:
    """Every failure is an `ExchangeError` after which the request may have arrived."""
    with pytest.raises(ExchangeError, match="the transport failed") as caught:
        await CheckedTransport(MisbehavingTransport(behave)).send(GET, timeout_s=1)
    assert caught.value.phase is Phase.SEND


@pytest.mark.parametrize("behave", ODD)
async def test_one_failing_poll_stops_no_other_task(behave: Callable[[WireRequest], Awaitable[object]]) -> None:
    """The other tasks finish, and the client keeps working."""

    async def mixed(request: WireRequest) -> object:
        return await behave(request) if "ta-bad" in request.url else finished("ta-good")

    async with Simulator(FAST_PROFILE).client(wrap=lambda _: MisbehavingTransport(mixed)) as client:
        ends: dict[str, object] = {}

        async def wait(task_id: str) -> None:
            try:
                ends[task_id] = await client.task(task_id).wait(timeout_s=0.3)
            except TransportError as exc:
                ends[task_id] = exc
            except Exception as exc:  # noqa: BLE001 - judged below
                ends[task_id] = type(exc).__name__

        async with anyio.create_task_group() as group:
            group.start_soon(wait, "ta-bad")
            group.start_soon(wait, "ta-good")
        assert ends["ta-bad"] == "TaskTimeout"
        assert getattr(ends["ta-good"], "task_id", None) == "ta-good"
        assert (await client.task("ta-good").query()).is_final


@pytest.mark.parametrize("behave", ODD)
async def test_a_submit_with_a_transport_failure_is_unknown(behave: Callable[[WireRequest], Awaitable[object]]) -> None:
    """The submit may have been charged, and no response confirms it."""
    async with Simulator(FAST_PROFILE).client(wrap=lambda _: MisbehavingTransport(behave)) as client:
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox")


async def test_a_cancellation_is_passed_on() -> None:
    """A cancellation is not turned into an error."""
    transport = MisbehavingTransport(lambda _: anyio.sleep(math.inf))
    with anyio.move_on_after(0.05) as scope:
        await CheckedTransport(transport).send(GET, timeout_s=10)
    assert scope.cancelled_caught


async def test_a_transport_that_hangs_holds_its_slot_until_the_timeout() -> None:
    """Other tasks are polled meanwhile."""

    async def mixed(request: WireRequest) -> object:
        if "ta-stuck" in request.url:
            await anyio.sleep(math.inf)
        return accepted("ta-good") if request.method == "POST" else finished("ta-good")

    client = NanoBananaClient("dk-test", transport=MisbehavingTransport(mixed), timeouts=Timeouts(query_s=5))
    async with client, anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(_wait_and_ignore_timeout, client, f"ta-stuck-{number}")
        await anyio.sleep(1)
        began_s = anyio.current_time()
        await client.generate("a fox", timeout_s=120)
        assert anyio.current_time() - began_s < 60
        with pytest.raises(TransportError):
            await client.task("ta-stuck-lone").query()
        group.cancel_scope.cancel()


async def _wait_and_ignore_timeout(client: NanoBananaClient, task_id: str) -> None:
    await client.task(task_id).wait(timeout_s=600)
