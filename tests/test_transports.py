"""What every transport does over real sockets: phases, limits, deadlines, connections and addresses.

`HttpxTransport` and `AiohttpTransport`, with connections of their own and over a client that was passed in.
"""

import base64
import contextlib
import gc
import gzip
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeAlias

import aiohttp
import anyio
import anyio.to_thread
import attrs
import httpx
import httpx2
import pytest
import trustme

from nanobanana_async import (
    AiohttpTransport,
    ExchangeError,
    HttpxTransport,
    Phase,
    RequestKind,
    Transport,
    WireResponse,
)
from nanobanana_async.transport import addresses
from nanobanana_async.wire.addresses import is_public
from tests.raw_server import Handler, ask, reset, response, sending, sending_then, serving

pytestmark = pytest.mark.anyio

TransportFactory: TypeAlias = Callable[[], "contextlib.AbstractAsyncContextManager[Transport]"]
TransportClass: TypeAlias = type[HttpxTransport] | type[AiohttpTransport]


@pytest.fixture(params=["httpx", "httpx-client", "httpx2-client", "aiohttp", "aiohttp-session"])
def make_transport(request: pytest.FixtureRequest) -> TransportFactory:
    """Return a factory of transports: with own connections, and over each library's client."""

    @contextlib.asynccontextmanager
    async def make() -> AsyncIterator[Transport]:
        async with contextlib.AsyncExitStack() as stack:
            transport: Transport
            if request.param == "httpx-client":
                transport = HttpxTransport(await stack.enter_async_context(httpx.AsyncClient()))
            elif request.param == "httpx2-client":
                transport = HttpxTransport(await stack.enter_async_context(httpx2.AsyncClient()))
            elif request.param == "aiohttp-session":
                transport = AiohttpTransport(await stack.enter_async_context(aiohttp.ClientSession()))
            else:
                transport = HttpxTransport() if request.param == "httpx" else AiohttpTransport()
            await stack.enter_async_context(contextlib.aclosing(transport))
            yield transport

    return make


@pytest.fixture(params=["httpx", "aiohttp"])
def transport_class(request: pytest.FixtureRequest) -> TransportClass:
    """Return the class of a transport."""
    return HttpxTransport if request.param == "httpx" else AiohttpTransport


async def test_a_response_is_returned_unchanged(make_transport: TransportFactory) -> None:
    """Status, lower-case headers and the raw body are returned."""
    with serving(sending(response(b"hello", X_Thing="a"))) as server:
        async with make_transport() as transport:
            received = await transport.send(ask(server), timeout_s=5)
    assert (received.status, received.body, received.headers["x-thing"]) == (200, b"hello", "a")


async def test_a_compressed_response_is_not_decompressed(make_transport: TransportFactory) -> None:
    """A few bytes can decompress to gigabytes, so the caller decides."""
    packed = gzip.compress(b"hello")
    with serving(sending(response(packed, Content_Encoding="gzip"))) as server:
        async with make_transport() as transport:
            assert (await transport.send(ask(server), timeout_s=5)).body == packed


async def test_a_redirect_is_returned_and_not_followed(make_transport: TransportFactory) -> None:
    """Following it would send the key, and the POST, to another host."""
    with serving(sending(response(status="307 Temporary Redirect", Location="/elsewhere"))) as server:
        async with make_transport() as transport:
            received = await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=5)
    assert (received.status, len(server.requests)) == (307, 1)


@pytest.mark.parametrize("kind", [RequestKind.SUBMIT, RequestKind.READ])
async def test_a_refused_connection_was_never_sent(make_transport: TransportFactory, kind: RequestKind) -> None:
    """The peer received no byte."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    async with make_transport() as transport:
        with pytest.raises(ExchangeError) as caught:
            await transport.send(ask(url, kind), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, False)


async def test_a_name_that_does_not_resolve_was_never_sent(make_transport: TransportFactory) -> None:
    """The failure is transient, because the name may resolve later."""
    async with make_transport() as transport:
        with pytest.raises(ExchangeError) as caught:
            await transport.send(ask("http://nothing.invalid/", RequestKind.SUBMIT), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, False)


@pytest.mark.parametrize("url", ["http://", "https://[::1", "nonsense", "http://a b/"])
async def test_a_malformed_url_is_a_permanent_error(transport_class: TransportClass, url: str) -> None:
    """Nothing leaves the machine."""
    async with contextlib.aclosing(transport_class()) as transport:
        with pytest.raises(ExchangeError) as caught:
            await transport.send(ask(url), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


CUT = response(b'{"task_id": "ta-1"', length=1000)


@pytest.mark.parametrize(
    ("handler", "phase", "kept"),
    [
        pytest.param(sending_then(socket.socket.close), Phase.SEND, None, id="fin-without-a-word"),
        pytest.param(sending_then(reset), Phase.SEND, None, id="rst-without-a-word"),
        pytest.param(sending_then(socket.socket.close, b"HTTP/1.1 200"), Phase.SEND, None, id="fin-in-headers"),
        pytest.param(sending_then(socket.socket.close, b"\0garbage\r\n\r\n"), Phase.SEND, None, id="garbage"),
        pytest.param(sending_then(socket.socket.close, CUT), Phase.RESPONSE, b'{"task_id": "ta-1"', id="fin-in-body"),
    ],
)
@pytest.mark.parametrize("kind", [RequestKind.SUBMIT, RequestKind.READ])
async def test_a_broken_exchange_reports_its_phase_and_keeps_the_bytes(
    make_transport: TransportFactory,
    kind: RequestKind,
    handler: Callable[[socket.socket, bytes], None],
    phase: Phase,
    kept: bytes | None,
) -> None:
    """The verdict on a charged submit depends on both."""
    with serving(handler) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server, kind), timeout_s=5)
    assert (caught.value.phase, caught.value.response and caught.value.response.body) == (phase, kept)


async def test_a_truncated_body_without_a_content_length_is_returned(make_transport: TransportFactory) -> None:
    """HTTP cannot detect the truncation; the caller has to."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    with serving(sending_then(socket.socket.close, head, b'{"half')) as server:
        async with make_transport() as transport:
            assert (await transport.send(ask(server), timeout_s=5)).body == b'{"half'


async def test_the_total_deadline_holds_against_a_peer_that_drips(make_transport: TransportFactory) -> None:
    """A peer that sends a byte now and then never triggers a read timeout."""

    def drip(peer: socket.socket, _: bytes) -> None:
        peer.sendall(response(b"", length=1000))
        for __ in range(100):
            peer.sendall(b"x")
            time.sleep(0.02)

    with serving(drip) as server:
        async with make_transport() as transport:
            start_s = time.monotonic()
            with pytest.raises(ExchangeError, match=r"no complete response within 0\.\d+ s") as caught:
                await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=0.3)
            assert time.monotonic() - start_s < 1.8
    assert caught.value.response is not None
    assert set(caught.value.response.body) == set(b"x")


async def test_a_peer_that_never_responds_may_have_the_request(make_transport: TransportFactory) -> None:
    """The phase is SEND, not CONNECT."""
    with serving(lambda *_: time.sleep(0.8)) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=0.6)
    assert caught.value.phase is Phase.SEND


@pytest.mark.slow
async def test_a_connection_that_is_never_made_was_never_sent(make_transport: TransportFactory) -> None:
    """A full backlog drops the SYN, so the deadline passes before a byte is sent."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                filler.connect(address)
        async with make_transport() as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(f"http://127.0.0.1:{address[1]}/", RequestKind.SUBMIT), timeout_s=0.5)
    assert caught.value.phase is Phase.CONNECT


async def test_downloads_reuse_a_connection_of_their_host(transport_class: TransportClass) -> None:
    """A fresh TLS connection for each image costs round trips."""
    with serving(sending(response(b"image"))) as server:
        async with contextlib.aclosing(transport_class(trust_env=False)) as transport:
            for _ in range(5):
                assert (await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5)).body == b"image"
        assert server.connections == 1


async def test_t8_a_body_that_trickles_ends_the_exchange(
    make_transport: TransportFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T8: twenty images at one byte per second held all downloads for minutes."""
    monkeypatch.setattr("nanobanana_async.transport._exchange._RATE_WINDOW_S", 0.2)

    def trickle(peer: socket.socket, _: bytes) -> None:
        peer.sendall(response(b"", length=1000))
        for _unused in range(100):
            peer.sendall(b"x")
            time.sleep(0.02)

    with serving(trickle) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError, match="less than 1024 bytes per second") as caught:
                await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5)
            assert not caught.value.permanent
            began_s = time.monotonic()
            with pytest.raises(ExchangeError):  # a query is bounded by its timeout alone
                await transport.send(ask(server, RequestKind.READ), timeout_s=0.5)
            assert time.monotonic() - began_s > 0.4


async def test_a_body_over_the_limit_ends_the_exchange(make_transport: TransportFactory) -> None:
    """Memory stays bounded, and the beginning is kept."""
    with serving(sending(response(b"y" * 100_000))) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError, match="exceeds the limit") as caught:
                await transport.send(ask(server, max_bytes=1000), timeout_s=5)
    assert caught.value.response is not None
    assert caught.value.response.body == b"y" * 1000


async def test_memory_is_reserved_before_the_body_of_a_200_and_of_nothing_else(transport_class: TransportClass) -> None:
    """The length is known by then, and an error page is small."""
    for status, expected in (("200 OK", ["8"]), ("404 Not Found", [])):
        with serving(sending(response(b"an image", status=status))) as server:
            async with contextlib.aclosing(transport_class()) as transport:
                lengths: list[str] = []

                async def reserve(head: WireResponse) -> None:
                    assert head.body == b""
                    lengths.append(head.headers["content-length"])  # noqa: B023 - used before the loop goes on

                request = attrs.evolve(ask(server, RequestKind.DOWNLOAD), before_body=reserve)
                assert (await transport.send(request, timeout_s=5)).body == b"an image"
        assert lengths == expected


async def test_a_cancelled_download_leaves_no_unfinished_generator(transport_class: TransportClass) -> None:
    """Trio would warn about it."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(sending(head + b"1\r\nx\r\n" * 1000)) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            with anyio.CancelScope() as scope:

                async def cancel(_: WireResponse) -> None:
                    scope.cancel()

                request = attrs.evolve(ask(server, RequestKind.DOWNLOAD), before_body=cancel)
                await transport.send(request, timeout_s=5)
            assert scope.cancelled_caught
    gc.collect()


async def test_reads_reuse_a_connection_and_submits_never_do(transport_class: TransportClass) -> None:
    """On reused connections, 20 of 4800 POSTs failed with an unknown charge."""
    with serving(sending(response(b"{}"))) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            for _ in range(4):
                await transport.send(ask(server), timeout_s=5)
            assert server.connections == 1
            for _ in range(3):
                await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=5)
            assert server.connections == 4


async def test_an_interrupted_connection_is_not_reused(transport_class: TransportClass) -> None:
    """The connection may still carry the end of another response."""
    with serving(sending(response(b"{}", length=5))) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            for number in range(3):
                async with anyio.create_task_group() as group:
                    group.start_soon(partial(transport.send, ask(server), timeout_s=5))
                    while len(server.requests) <= number:
                        await anyio.sleep(0.01)
                    group.cancel_scope.cancel()
            assert server.connections == 3


async def test_a_connection_the_server_closed_meanwhile_is_replaced(transport_class: TransportClass) -> None:
    """A server may close an idle connection at any time."""
    with serving(sending_then(socket.socket.close, response(b"{}"))) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            for _ in range(5):
                assert (await transport.send(ask(server), timeout_s=5)).status == 200
                await anyio.sleep(0.02)


@pytest.mark.slow
async def test_a_thousand_cancelled_requests_leave_a_working_transport(transport_class: TransportClass) -> None:
    """Httpx's own pool fails after ten."""
    with serving(sending(response(b"{}"))) as server:
        async with contextlib.aclosing(transport_class()) as transport:

            async def impatient(timeout_s: float) -> None:
                with anyio.move_on_after(timeout_s):
                    await transport.send(ask(server), timeout_s=5)

            for _ in range(10):
                async with anyio.create_task_group() as group:
                    for number in range(100):
                        group.start_soon(impatient, number * 0.0003)
            assert (await transport.send(ask(server), timeout_s=5)).status == 200


@pytest.mark.parametrize("url", ["http://localhost:{}/", "http://2130706433:{}/", "http://[::ffff:127.0.0.1]:{}/"])
async def test_a_guarded_request_never_reaches_a_private_address(transport_class: TransportClass, url: str) -> None:
    """A name, an integer and a mapped IPv6 address are all refused."""
    with serving(sending(response(b"secret"))) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            with pytest.raises(ExchangeError, match="not a public address") as caught:
                await transport.send(ask(url.format(server.port), RequestKind.DOWNLOAD, public_only=True), timeout_s=5)
    assert (caught.value.permanent, server.connections) == (True, 0)


async def test_a_guarded_request_connects_to_the_address_that_was_checked(
    transport_class: TransportClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second lookup may give another address; the host name remains in `Host`."""
    with serving(sending(response(b"an image"))) as server:

        async def rebinding(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        monkeypatch.setattr(addresses, "resolve", rebinding)
        monkeypatch.setattr(addresses, "is_public", bool)
        async with contextlib.aclosing(transport_class()) as transport:
            request = ask(f"http://files.example:{server.port}/1.png", RequestKind.DOWNLOAD, public_only=True)
            assert (await transport.send(request, timeout_s=5)).body == b"an image"
    assert f"host: files.example:{server.port}".encode() in server.requests[0].lower()


@pytest.mark.parametrize(
    ("service_at", "url", "is_taken"),
    [
        pytest.param("198.18.0.7", "http://files.example/1.png", True, id="both-fake"),
        pytest.param("93.184.216.34", "http://files.example/1.png", False, id="service-is-true"),
        pytest.param("198.18.0.7", "http://198.18.0.9/1.png", False, id="literal"),
        pytest.param("198.18.0.7", "http://3323068425/1.png", False, id="integer"),
        pytest.param("198.18.0.7", "http://intranet.example/1.png", False, id="private"),
    ],
)
async def test_a1_a_fake_address_is_taken_where_the_service_has_one_too(
    transport_class: TransportClass, monkeypatch: pytest.MonkeyPatch, service_at: str, url: str, *, is_taken: bool
) -> None:
    """Clash, mihomo and sing-box return 198.18.0.0/15 for every name. As a literal it is refused."""
    names = {"api.example": service_at, "files.example": "198.18.0.9", "intranet.example": "10.0.0.1"}

    async def fake_dns(host: str, port: int) -> list[str]:
        return [names.get(host, "198.18.0.9")]

    monkeypatch.setattr(addresses, "resolve", fake_dns)
    async with contextlib.aclosing(transport_class(connect_s=0.05)) as transport:
        refused = ""
        with contextlib.suppress(ExchangeError):  # whether these addresses can be reached here is not the point
            await transport.send(ask("http://api.example:9/x"), timeout_s=0.1)
        try:
            await transport.send(ask(url, RequestKind.DOWNLOAD, public_only=True), timeout_s=0.2)
        except ExchangeError as exc:
            refused = str(exc)
    assert ("not a public address" not in refused) is is_taken
    assert (f"{transport_class.__name__}(check_addresses=False)" in refused) is not is_taken


async def test_a1_behind_a_proxy_the_proxy_decides_and_the_check_can_be_turned_off(
    transport_class: TransportClass,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers of the local resolver say nothing of what the proxy connects to."""

    async def private_dns(host: str, port: int) -> list[str]:
        return ["10.0.0.1"]

    monkeypatch.setattr(addresses, "resolve", private_dns)
    with serving(sending(response(b"by proxy"))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        async with contextlib.aclosing(transport_class()) as transport:
            request = ask("http://files.example/1.png", RequestKind.DOWNLOAD, public_only=True)
            assert (await transport.send(request, timeout_s=5)).body == b"by proxy"
            with pytest.raises(ExchangeError, match="not a public address"):
                await transport.send(ask("http://10.0.0.1/1.png", RequestKind.DOWNLOAD, public_only=True), timeout_s=5)
    monkeypatch.delenv("http_proxy")
    with serving(sending(response(b"inside"))) as server:
        async with contextlib.aclosing(transport_class(check_addresses=False)) as transport:
            request = ask(f"http://127.0.0.1:{server.port}/1.png", RequestKind.DOWNLOAD, public_only=True)
            assert (await transport.send(request, timeout_s=5)).body == b"inside"


async def test_plain_http_behind_an_https_url_is_a_configuration_error(transport_class: TransportClass) -> None:
    """The error is permanent, because a retry cannot help."""
    with serving(sending(b"HTTP/1.1 400 Bad Request\r\n\r\n"), reads=False) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server.url.replace("http:", "https:"), RequestKind.SUBMIT), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


async def test_a_proxy_from_the_environment_is_used(
    transport_class: TransportClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_PROXY and `trust_env=False` turn it off."""
    with serving(sending(response(b"by proxy"))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "inside.example")
        async with contextlib.aclosing(transport_class()) as transport:
            assert (await transport.send(ask("http://api.example/x"), timeout_s=5)).body == b"by proxy"
            with pytest.raises(ExchangeError):
                await transport.send(ask("http://inside.example/x"), timeout_s=5)
        async with contextlib.aclosing(transport_class(trust_env=False)) as transport:
            with pytest.raises(ExchangeError):
                await transport.send(ask("http://api.example/x"), timeout_s=5)


@pytest.mark.parametrize("value", ["me:s3#cret@127.0.0.1:{}", "http://me:s3#cret@127.0.0.1:{}", "127.0.0.1:{}"])
async def test_g1_a_proxy_is_taken_as_other_tools_take_it(
    transport_class: TransportClass, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a scheme, and with a password that is not percent-encoded."""
    with serving(sending(response(b"by proxy"))) as proxy:
        monkeypatch.setenv("http_proxy", value.format(proxy.port))
        async with contextlib.aclosing(transport_class()) as transport:
            assert (await transport.send(ask("http://api.example/x"), timeout_s=5)).body == b"by proxy"
    if "@" in value:
        assert b"Proxy-Authorization: Basic " + base64.b64encode(b"me:s3#cret") in proxy.requests[0]


@pytest.mark.parametrize(
    "value", ["ftp://me:s3cret@127.0.0.1:3128", "http://me:s3cret@127.0.0.1:no", "socks4://a:s3cret@b:1"]
)
async def test_g1_a_proxy_that_cannot_be_used_is_named_without_its_password(
    transport_class: TransportClass, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a run is not a place for it."""
    monkeypatch.setenv("http_proxy", value)
    async with contextlib.aclosing(transport_class()) as transport:
        with pytest.raises(ExchangeError, match=r"the proxy .* cannot be used") as caught:
            await transport.send(ask("http://api.example/x"), timeout_s=5)
    assert caught.value.permanent
    assert "s3cret" not in str(caught.value)


async def test_a3_a_proxy_and_a_certificate_given_in_code_hold_for_images(
    transport_class: TransportClass, tmp_path: Path
) -> None:
    """An image is not downloaded past them."""
    with serving(sending(response(b"by proxy"))) as proxy:
        async with contextlib.aclosing(transport_class(proxy=proxy.url)) as transport:
            request = ask("http://files.example/1.png", RequestKind.DOWNLOAD, public_only=True)
            assert (await transport.send(request, timeout_s=5)).body == b"by proxy"
    authority = trustme.CA()
    tls, verify = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.configure_trust(verify)
    with serving(sending(response(b"inside")), tls=tls) as server:
        async with contextlib.aclosing(transport_class(verify=verify)) as transport:
            request = ask(server.url.replace("http:", "https:"), RequestKind.DOWNLOAD)
            assert (await transport.send(request, timeout_s=5)).body == b"inside"


def _hang(peer: socket.socket, _: bytes) -> None:
    """Respond to nothing, until the client gives up."""
    with contextlib.suppress(OSError):
        peer.recv(1)


def _lie(peer: socket.socket, _: bytes) -> None:
    """Claim that the tunnel is open, and leave the TLS handshake without a response."""
    peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    _hang(peer, b"")


@pytest.mark.parametrize(
    "handle",
    [
        pytest.param(_hang, id="hangs"),
        pytest.param(_lie, id="lies"),
        pytest.param(sending_then(socket.socket.close), id="drops"),
        pytest.param(sending(b"garbage\r\n\r\n"), id="garbage"),
        pytest.param(sending(response(b"no", status="502 Bad Gateway")), id="refuses"),
        pytest.param(sending_then(socket.socket.close, b"HTTP/1.1 200 OK\r\n\r\n"), id="drops-after-200"),
    ],
)
async def test_b1_a_proxy_that_fails_at_connect_has_sent_nothing(
    transport_class: TransportClass, handle: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CONNECT of the tunnel is not our request, so nothing can have been charged."""
    with serving(handle) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        async with contextlib.aclosing(transport_class(connect_s=5)) as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask("https://api.example/x", RequestKind.SUBMIT), timeout_s=0.5)
    assert caught.value.phase is Phase.CONNECT


async def test_b2_a_submit_that_waits_for_a_thread_has_sent_nothing(transport_class: TransportClass) -> None:
    """Forty busy threads delay the TLS context, and no connection is made."""
    gate = threading.Event()
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with anyio.create_task_group() as group:
        for _ in range(int(limiter.total_tokens)):
            group.start_soon(partial(anyio.to_thread.run_sync, gate.wait))
        await anyio.sleep(0.1)
        async with contextlib.aclosing(transport_class()) as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask("https://127.0.0.1:9/", RequestKind.SUBMIT), timeout_s=0.2)
        gate.set()
    assert caught.value.phase is Phase.CONNECT


async def test_an_error_contains_nothing_of_the_request(transport_class: TransportClass) -> None:
    """Neither its text nor its chained exceptions contain the request."""
    key = "Bearer dk-CANARY"
    for headers in ({"Authorization": key}, {"Authorization": f"{key}\n"}, {"Authorization": f"{key}\u20ac"}):
        with serving(sending_then(socket.socket.close)) as server:
            async with contextlib.aclosing(transport_class()) as transport:
                with pytest.raises(ExchangeError) as caught:
                    await transport.send(ask(server, RequestKind.SUBMIT, headers=headers), timeout_s=5)
        assert "CANARY" not in str(caught.value)
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None


async def test_a_missing_certificate_file_is_a_configuration_error(
    transport_class: TransportClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent, and there is no retry."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent.pem")
    async with contextlib.aclosing(transport_class()) as transport:
        with pytest.raises(ExchangeError, match="certificate file") as caught:
            await transport.send(ask("https://127.0.0.1:9/", RequestKind.SUBMIT), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


@pytest.mark.parametrize("flaw", ["none", "wrong-host", "expired", "unknown-authority"])
async def test_an_invalid_certificate_is_a_configuration_error(
    transport_class: TransportClass, flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is not sent; a valid one is accepted through SSL_CERT_FILE."""
    authority = trustme.CA()
    if flaw != "unknown-authority":
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    name = "other.example" if flaw == "wrong-host" else "127.0.0.1"
    past = datetime(2020, 1, 1, tzinfo=UTC) if flaw == "expired" else None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_after=past).configure_cert(tls)
    with serving(sending(response(b"{}")), tls=tls) as server:
        async with contextlib.aclosing(transport_class()) as transport:
            request = ask(server.url.replace("http:", "https:"), RequestKind.SUBMIT)
            if flaw == "none":
                assert (await transport.send(request, timeout_s=5)).status == 200
            else:
                with pytest.raises(ExchangeError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                    await transport.send(request, timeout_s=5)
                assert (caught.value.phase, caught.value.permanent, server.requests) == (Phase.CONNECT, True, [])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        ("::ffff:8.8.8.8", True),
        *((private, False) for private in (
            "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",  # noqa: S104
            "224.0.0.1", "255.255.255.255", "192.88.99.1", "::1", "::", "fe80::1%eth0", "fd00::1", "fec0::1", "ff02::1",
            "198.18.0.1", "::ffff:198.19.0.1", "64:ff9b::c612:1", "64:ff9b:1::808:808",
            "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001::1", "no address",
        )),
    ],
)  # fmt: skip
def test_private_addresses_are_recognized_in_every_notation(address: str, public: bool) -> None:  # noqa: FBT001 - a table
    """Mapped, embedded and special-purpose addresses are not public."""
    assert is_public(address) is public
