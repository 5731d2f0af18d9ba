"""`HttpxTransport`: idle connections, the TLS context, and a client of httpx or httpx2 that was passed in."""

import contextlib
import ssl

import anyio
import httpx
import pytest

from nanobanana_async import ConfigurationError, ExchangeError, HttpxTransport, RequestKind
from tests.raw_server import ask, response, sending, sending_then, serving

pytestmark = pytest.mark.anyio


async def test_t7_connections_that_the_server_has_closed_are_closed() -> None:
    """T7: 64 of them rested in CLOSE_WAIT until the next query."""
    async with contextlib.aclosing(HttpxTransport(trust_env=False)) as transport:
        with serving(sending_then(lambda peer: peer.close(), response(b"{}"))) as server:
            await transport.send(ask(server, RequestKind.READ), timeout_s=5)
            assert len(transport._idle_connections) == 1  # noqa: SLF001 - what a user sees with ss
            with anyio.fail_after(5):
                while transport._idle_connections:  # noqa: SLF001 - the same
                    await anyio.sleep(0.01)
                    await transport.close_expired()


async def test_a_client_that_was_passed_in_adds_no_idle_connections() -> None:
    """The pool of that client keeps the connections."""
    with serving(sending(response(b"{}"))) as server:
        async with httpx.AsyncClient() as client:
            transport = HttpxTransport(client)
            for _ in range(4):
                await transport.send(ask(server), timeout_s=5)
            assert not any(transport._idle_connections.values())  # noqa: SLF001 - nothing public shows them


@pytest.mark.parametrize("how", ["event-hook", "mock-transport"])
async def test_a_response_that_the_users_client_has_read_is_still_returned(how: str) -> None:
    """An event hook may log bodies, and httpx's test transport reads them, too."""

    async def read(response: httpx.Response) -> None:
        await response.aread()

    whole = response(b'{"code":0,"data":{"task_id":"ta-1"}}')
    with serving(sending(whole)) as server:
        if how == "event-hook":
            client = httpx.AsyncClient(event_hooks={"response": [read]})
        else:
            client = httpx.AsyncClient(
                transport=httpx.MockTransport(lambda _: httpx.Response(200, json={"data": {"task_id": "ta-1"}}))
            )
        async with client:
            received = await HttpxTransport(client).send(ask(server, RequestKind.SUBMIT), timeout_s=5)
    assert b"ta-1" in received.body


async def test_images_are_never_downloaded_with_the_users_client() -> None:
    """The user's client may hold cookies, credentials or an internal certificate."""
    with serving(sending(response(b"{}"))) as server:
        async with httpx.AsyncClient(headers={"X-Api-Key": "dk-secret"}, cookies={"session": "s"}) as client:
            transport = HttpxTransport(client)
            await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5)
            await transport.aclose()
            assert not client.is_closed
    assert b"dk-secret" not in server.requests[0]
    assert b"session" not in server.requests[0]


def test_a_synchronous_client_is_rejected() -> None:
    """The error names the expected types."""
    with pytest.raises(ConfigurationError, match=r"expected httpx\.AsyncClient or httpx2\.AsyncClient, got httpx"):
        HttpxTransport(httpx.Client())  # type: ignore[arg-type]


async def test_the_tls_context_is_created_once_and_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating it takes 20 to 50 ms."""
    made = []

    def create(**settings: object) -> ssl.SSLContext:
        made.append(settings)
        return ssl.create_default_context()

    async def fail_to_connect(transport: HttpxTransport) -> None:
        with pytest.raises(ExchangeError, match=r"refused|failed"):
            await transport.send(ask("https://127.0.0.1:9/"), timeout_s=5)

    monkeypatch.setattr(httpx, "create_ssl_context", create)
    async with contextlib.aclosing(HttpxTransport()) as transport, anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(fail_to_connect, transport)
    assert len(made) == 1
