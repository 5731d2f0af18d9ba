"""`AiohttpTransport`: what differs from httpx, and a session that was passed in."""

import contextlib
import gc
import socket
import subprocess
import sys
import time

import aiohttp
import anyio
import attrs
import pytest

from nanobanana_async import (
    AiohttpTransport,
    ConfigurationError,
    ExchangeError,
    NanoBananaClient,
    NotSent,
    Phase,
    RequestKind,
)
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE
from nanobanana_async.simulator.server import SimulatorServer
from tests.raw_server import ask, response, sending, sending_then, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Return the only event loop that aiohttp supports."""
    return "asyncio"


async def test_an_image_is_made_and_downloaded() -> None:
    """The client works as with httpx, without a change."""
    with SimulatorServer(FAST_PROFILE) as server:
        transport = AiohttpTransport()
        async with NanoBananaClient(
            "dk-test", base_url=server.url, polling=FAST_POLLING, transport=transport
        ) as client:
            task = await client.generate("a fox")
            assert (await client.download(task.images[0])).startswith(b"\x89PNG")
        await transport.aclose()


async def test_bytes_that_came_before_a_failure_are_kept_though_both_are_read_late() -> None:
    """The task id may be in them. aiohttp's reader raises the failure before it returns them."""
    cut = response(b'{"task_id": "ta-1"', length=1000)
    with serving(sending_then(socket.socket.close, cut)) as server:
        async with contextlib.aclosing(AiohttpTransport()) as transport:

            async def be_late(_: object) -> None:
                await anyio.sleep(0.1)

            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server, before_body=be_late), timeout_s=5)
    assert caught.value.response is not None
    assert caught.value.response.body == b'{"task_id": "ta-1"'


async def test_a_submit_that_waits_in_the_pool_of_the_users_session_has_sent_nothing() -> None:
    """That session may have fewer connections than the client has submits in flight."""
    with serving(lambda *_: time.sleep(0.5)) as server:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            transport = AiohttpTransport(session)
            errors: list[ExchangeError] = []

            async def submit() -> None:
                with pytest.raises(ExchangeError) as caught:
                    await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=0.3)
                errors.append(caught.value)

            async with anyio.create_task_group() as group:
                group.start_soon(submit)
                group.start_soon(submit)
    assert sorted(error.phase for error in errors) == [Phase.CONNECT, Phase.SEND]


async def test_the_users_session_keeps_its_headers_and_stays_open() -> None:
    """It is the user's way to pass a gateway."""
    with serving(sending(response(b"{}"))) as server:
        async with aiohttp.ClientSession(headers={"X-Gateway": "g"}) as session:
            async with contextlib.aclosing(AiohttpTransport(session)) as transport:
                await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=5)
            assert not session.closed
    assert b"X-Gateway: g" in server.requests[0]


async def test_nothing_is_sent_after_the_transport_or_the_users_session_was_closed() -> None:
    """The error is permanent: a retry cannot help."""
    closed = AiohttpTransport()
    await closed.aclose()
    await closed.aclose()
    session = aiohttp.ClientSession()
    await session.close()
    for transport in (closed, AiohttpTransport(session)):
        with pytest.raises(ExchangeError, match="closed") as caught:
            await transport.send(ask("http://127.0.0.1:9/", RequestKind.SUBMIT), timeout_s=5)
        assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


async def test_a_large_body_arrives_whole() -> None:
    """Four reference images are tens of megabytes."""
    body = bytes(range(256)) * 20_000
    with serving(sending(response(b"{}"))) as server:
        async with contextlib.aclosing(AiohttpTransport()) as transport:
            request = ask(server, RequestKind.SUBMIT)
            await transport.send(attrs.evolve(request, body=body), timeout_s=5)
    assert server.requests[0].endswith(b"\r\n\r\n" + body)


async def test_a_transport_that_is_dropped_closes_its_connections_without_a_warning() -> None:
    """A bot passes one in place, and has nothing to close it by."""
    with serving(sending(response(b"{}"))) as server:
        transport = AiohttpTransport()
        await transport.send(ask(server), timeout_s=5)
        del transport
        gc.collect()
        with anyio.fail_after(5):
            while server.open_connections:
                await anyio.sleep(0.01)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # asyncio's own, for the connection
def test_a_transport_that_is_dropped_after_its_event_loop_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    """As at the end of a script: aiohttp would log an unclosed session, as an error."""
    with serving(sending(response(b"{}"))) as server:

        async def use() -> None:
            transports.append(AiohttpTransport())
            await transports[0].send(ask(server), timeout_s=5)

        transports: list[AiohttpTransport] = []
        anyio.run(use)
        transports.clear()
        gc.collect()
    assert caplog.records == []


def test_on_trio_the_error_names_the_event_loop() -> None:
    """Nothing is sent."""

    async def submit() -> None:
        async with NanoBananaClient("dk-1", base_url="http://127.0.0.1:9", transport=AiohttpTransport()) as client:
            with pytest.raises((NotSent, ConfigurationError), match="AiohttpTransport runs on asyncio only"):
                await client.submit("a fox")

    anyio.run(submit, backend="trio")


def test_a_session_of_another_library_is_refused() -> None:
    """The error names the expected type."""
    with pytest.raises(ConfigurationError, match=r"session: expected aiohttp\.ClientSession, got int"):
        AiohttpTransport(1)  # type: ignore[arg-type]


def test_without_aiohttp_the_import_names_the_extra() -> None:
    """The package itself is imported without it."""
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "import nanobanana_async\n"
        "try: nanobanana_async.AiohttpTransport\n"
        "except ImportError as exc: print(exc)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert "pip install 'nanobanana-async[aiohttp]'" in ran.stdout
