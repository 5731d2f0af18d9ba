"""`HttpxTransport` over real sockets: phases, caps, deadlines, lanes; the same over a client that is handed in."""

import contextlib
import gc
import gzip
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
import httpx
import httpx2
import pytest
import trustme

from nanobanana_async import ConfigurationError, ExchangeError, HttpxTransport, Phase, RequestKind, WireRequest
from nanobanana_async.transport import addresses
from nanobanana_async.transport import httpx as transport_module
from tests.raw_server import RawServer, reset, response, saying, saying_then, serving

pytestmark = pytest.mark.anyio

Carriers = Callable[[], "contextlib.AbstractAsyncContextManager[HttpxTransport]"]


def ask(server: RawServer | str, kind: RequestKind = RequestKind.READ, **fields: object) -> WireRequest:
    """Return a request to *server*."""
    url = server if isinstance(server, str) else f"{server.url}/path"
    body = b"{}" if kind is RequestKind.SUBMIT else None
    return WireRequest(kind=kind, method="POST" if body else "GET", url=url, body=body, **fields)  # type: ignore[arg-type]


@pytest.fixture(params=["lanes", "httpx", "httpx2"])
def make_transport(request: pytest.FixtureRequest) -> Carriers:
    """Make a transport of our own lanes, and over each library's client."""

    @contextlib.asynccontextmanager
    async def make() -> AsyncIterator[HttpxTransport]:
        client: httpx.AsyncClient | httpx2.AsyncClient | None = None
        if request.param == "httpx":
            client = httpx.AsyncClient()
        elif request.param == "httpx2":
            client = httpx2.AsyncClient()
        transport = HttpxTransport(client)
        try:
            yield transport
        finally:
            await transport.aclose()
            if client is not None:
                await client.aclose()

    return make


async def test_a_reply_comes_back_as_it_was_sent(make_transport: Carriers) -> None:
    """Status, headers in lower case, body untouched."""
    with serving(saying(response(b"hello", X_Thing="a"))) as server:
        async with make_transport() as transport:
            reply = await transport.send(ask(server), timeout_s=5)
    assert (reply.status, reply.body, reply.headers["x-thing"]) == (200, b"hello", "a")


async def test_a_compressed_reply_is_not_inflated(make_transport: Carriers) -> None:
    """A few bytes can inflate to gigabytes; that is not the transport's decision."""
    packed = gzip.compress(b"hello")
    with serving(saying(response(packed, Content_Encoding="gzip"))) as server:
        async with make_transport() as transport:
            assert (await transport.send(ask(server), timeout_s=5)).body == packed


async def test_a_redirect_is_a_reply_and_not_followed(make_transport: Carriers) -> None:
    """Following one would carry the key, and re-send the POST, to somebody else."""
    with serving(saying(response(status="307 Temporary Redirect", Location="/elsewhere"))) as server:
        async with make_transport() as transport:
            reply = await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=5)
    assert (reply.status, len(server.requests)) == (307, 1)


@pytest.mark.parametrize("kind", [RequestKind.SUBMIT, RequestKind.READ])
async def test_a_refused_connection_was_never_sent(make_transport: Carriers, kind: RequestKind) -> None:
    """The peer provably had no byte."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    async with make_transport() as transport:
        with pytest.raises(ExchangeError) as caught:
            await transport.send(ask(url, kind), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, False)


async def test_a_name_that_does_not_resolve_was_never_sent(make_transport: Carriers) -> None:
    """And may resolve later."""
    async with make_transport() as transport:
        with pytest.raises(ExchangeError) as caught:
            await transport.send(ask("http://nothing.invalid/", RequestKind.SUBMIT), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, False)


@pytest.mark.parametrize("url", ["http://", "https://[::1", "nonsense", "http://a b/"])
async def test_a_malformed_url_is_hopeless(url: str) -> None:
    """And never leaves the machine."""
    async with contextlib.aclosing(HttpxTransport()) as transport:
        with pytest.raises(ExchangeError) as caught:
            await transport.send(ask(url), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


CUT = response(b'{"task_id": "ta-1"', length=1000)


@pytest.mark.parametrize(
    ("handler", "phase", "kept"),
    [
        pytest.param(saying_then(socket.socket.close), Phase.SEND, None, id="fin-without-a-word"),
        pytest.param(saying_then(reset), Phase.SEND, None, id="rst-without-a-word"),
        pytest.param(saying_then(socket.socket.close, b"HTTP/1.1 200"), Phase.SEND, None, id="fin-in-headers"),
        pytest.param(saying_then(socket.socket.close, b"\0garbage\r\n\r\n"), Phase.SEND, None, id="garbage"),
        pytest.param(saying_then(socket.socket.close, CUT), Phase.RESPONSE, b'{"task_id": "ta-1"', id="fin-in-body"),
    ],
)
@pytest.mark.parametrize("kind", [RequestKind.SUBMIT, RequestKind.READ])
async def test_a_broken_exchange_says_how_far_it_got_and_keeps_what_came(
    make_transport: Carriers,
    kind: RequestKind,
    handler: Callable[[socket.socket, bytes], None],
    phase: Phase,
    kept: bytes | None,
) -> None:
    """The verdict on a paid submit hangs on both."""
    with serving(handler) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server, kind), timeout_s=5)
    assert (caught.value.phase, caught.value.response and caught.value.response.body) == (phase, kept)


async def test_a_body_cut_without_a_content_length_is_just_short(make_transport: Carriers) -> None:
    """HTTP cannot tell; the reader above has to."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    with serving(saying_then(socket.socket.close, head, b'{"half')) as server:
        async with make_transport() as transport:
            assert (await transport.send(ask(server), timeout_s=5)).body == b'{"half'


async def test_the_total_deadline_holds_against_a_peer_that_drips(make_transport: Carriers) -> None:
    """A byte now and then never trips a read timeout."""

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


async def test_a_peer_that_never_answers_may_have_been_paid(make_transport: Carriers) -> None:
    """Connected, request on its way, silence: not "never sent"."""
    with serving(lambda *_: time.sleep(0.6)) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=0.3)
    assert caught.value.phase is Phase.SEND


async def test_a_connection_that_is_never_made_was_never_sent(make_transport: Carriers) -> None:
    """A full backlog drops our SYN: the deadline passes before a byte of the request could leave."""
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


async def test_a_body_over_the_cap_ends_the_exchange_at_the_cap(make_transport: Carriers) -> None:
    """Memory stays bounded, and the beginning is kept."""
    with serving(saying(response(b"y" * 100_000))) as server:
        async with make_transport() as transport:
            with pytest.raises(ExchangeError, match="exceeds the limit") as caught:
                await transport.send(ask(server, max_bytes=1000), timeout_s=5)
    assert caught.value.response is not None
    assert caught.value.response.body == b"y" * 1000


async def test_a_sink_gets_the_body_of_a_200_and_of_nothing_else() -> None:
    """An error page has no place in somebody's file."""
    for status, expected in (("200 OK", b"picture"), ("404 Not Found", b"")):
        with serving(saying(response(b"picture", status=status))) as server:
            async with contextlib.aclosing(HttpxTransport()) as transport:
                got = bytearray()

                async def sink(chunk: bytes) -> None:
                    got.extend(chunk)  # noqa: B023 - used before the loop goes on

                await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5, sink=sink)
        assert got == expected


@pytest.mark.parametrize("moment", ["in the sink", "between two pieces"])
async def test_a_download_that_is_cancelled_half_way_leaves_nothing_to_the_garbage_collector(moment: str) -> None:
    """It would warn, on trio, of generators that nobody has ended."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(saying(head + b"1\r\nx\r\n" * 1000)) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            with anyio.CancelScope() as scope:

                async def sink(_: bytes) -> None:
                    scope.cancel()
                    if moment == "in the sink":
                        await anyio.lowlevel.checkpoint()

                await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5, sink=sink)
            assert scope.cancelled_caught
    gc.collect()


async def test_what_a_sink_raises_comes_out_as_it_is() -> None:
    """A full disk is not a network error."""

    async def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with serving(saying(response(b"picture"))) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            with pytest.raises(OSError, match="No space left"):
                await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5, sink=full)


async def test_reads_reuse_a_connection_and_submits_never_do() -> None:
    """On reused connections, 20 of 4800 POSTs failed without anybody knowing whether they were paid."""
    with serving(saying(response(b"{}"))) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            for _ in range(4):
                await transport.send(ask(server), timeout_s=5)
            assert server.connections == 1
            for _ in range(3):
                await transport.send(ask(server, RequestKind.SUBMIT), timeout_s=5)
            assert server.connections == 4


async def test_a_client_that_was_handed_in_leaves_nothing_behind() -> None:
    """Its own pool keeps the connections; what is kept here as well would grow with each poll of the night."""
    with serving(saying(response(b"{}"))) as server:
        async with httpx.AsyncClient() as client:
            transport = HttpxTransport(client)
            for _ in range(4):
                await transport.send(ask(server), timeout_s=5)
            assert not any(transport._idle_connections.values())


async def test_a_lane_that_was_cut_off_is_not_used_again() -> None:
    """Its connection may still carry the end of somebody else's reply."""
    with serving(saying(response(b"{}", length=5))) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            for number in range(3):
                async with anyio.create_task_group() as group:
                    group.start_soon(partial(transport.send, ask(server), timeout_s=5))
                    while len(server.requests) <= number:
                        await anyio.sleep(0.01)
                    group.cancel_scope.cancel()
            assert (server.connections, sum(map(len, transport._idle_connections.values()))) == (3, 0)


async def test_a_connection_the_server_closed_meanwhile_is_replaced() -> None:
    """Keep-alive is a hope, not a plan."""
    with serving(saying_then(socket.socket.close, response(b"{}"))) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            for _ in range(5):
                assert (await transport.send(ask(server), timeout_s=5)).status == 200
                await anyio.sleep(0.02)


async def test_a_thousand_cancelled_requests_do_not_wedge_anything() -> None:
    """Httpx's own pool is dead for good after ten."""
    with serving(saying(response(b"{}"))) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:

            async def impatient(patience_s: float) -> None:
                with anyio.move_on_after(patience_s):
                    await transport.send(ask(server), timeout_s=5)

            for _ in range(10):
                async with anyio.create_task_group() as group:
                    for number in range(100):
                        group.start_soon(impatient, number * 0.0003)
            assert (await transport.send(ask(server), timeout_s=5)).status == 200


@pytest.mark.parametrize("how", ["event-hook", "mock-transport"])
async def test_a_reply_that_a_client_of_the_users_has_read_already_is_read_all_the_same(how: str) -> None:
    """An event hook that logs bodies, or httpx's own test transport, must not cost a paid id."""

    async def read(response: httpx.Response) -> None:
        await response.aread()

    whole = response(b'{"code":0,"data":{"task_id":"ta-1"}}')
    with serving(saying(whole)) as server:
        if how == "event-hook":
            client = httpx.AsyncClient(event_hooks={"response": [read]})
        else:
            client = httpx.AsyncClient(
                transport=httpx.MockTransport(lambda _: httpx.Response(200, json={"data": {"task_id": "ta-1"}}))
            )
        async with client:
            reply = await HttpxTransport(client).send(ask(server, RequestKind.SUBMIT), timeout_s=5)
    assert b"ta-1" in reply.body


async def test_pictures_never_travel_by_a_client_that_was_handed_in() -> None:
    """It may hold cookies, credentials or an internal certificate."""
    with serving(saying(response(b"{}"))) as server:
        async with httpx.AsyncClient(headers={"X-Api-Key": "dk-secret"}, cookies={"session": "s"}) as client:
            transport = HttpxTransport(client)
            await transport.send(ask(server, RequestKind.DOWNLOAD), timeout_s=5)
            await transport.aclose()
            assert not client.is_closed
    assert b"dk-secret" not in server.requests[0]
    assert b"session" not in server.requests[0]


def test_a_client_that_cannot_be_awaited_is_refused() -> None:
    """At once, with what was expected."""
    with pytest.raises(ConfigurationError, match=r"expected httpx\.AsyncClient or httpx2\.AsyncClient, got httpx"):
        HttpxTransport(httpx.Client())  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://localhost:{}/", "http://2130706433:{}/", "http://[::ffff:127.0.0.1]:{}/"])
async def test_a_guarded_request_never_reaches_a_private_address(url: str) -> None:
    """By name, as one number, or dressed up as IPv6."""
    with serving(saying(response(b"secret"))) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            with pytest.raises(ExchangeError, match="not a public address") as caught:
                await transport.send(ask(url.format(server.port), RequestKind.DOWNLOAD, public_only=True), timeout_s=5)
    assert (caught.value.permanent, server.connections) == (True, 0)


async def test_a_guarded_request_dials_the_address_that_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whatever the name leads to a moment later; the name stays in `BackgroundTaskGroup`."""
    with serving(saying(response(b"picture"))) as server:

        async def rebinding(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        monkeypatch.setattr(transport_module, "resolve", rebinding)
        monkeypatch.setattr(transport_module, "is_public", bool)
        async with contextlib.aclosing(HttpxTransport()) as transport:
            request = ask(f"http://files.example:{server.port}/1.png", RequestKind.DOWNLOAD, public_only=True)
            assert (await transport.send(request, timeout_s=5)).body == b"picture"
    assert f"host: files.example:{server.port}".encode() in server.requests[0].lower()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        *((private, False) for private in (
            "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",  # noqa: S104
            "224.0.0.1", "255.255.255.255", "192.88.99.1", "::1", "::", "fe80::1%eth0", "fd00::1", "fec0::1", "ff02::1",
            "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001::1", "no address",
        )),
    ],
)  # fmt: skip
def test_only_addresses_that_anybody_could_reach_are_public(address: str, public: bool) -> None:  # noqa: FBT001 - a table
    """Private ones hide in many notations."""
    assert addresses.is_public(address) is public


async def test_plain_http_behind_an_https_url_is_a_configuration_error() -> None:
    """It will not get better by trying again."""
    with serving(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), reads=False) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            with pytest.raises(ExchangeError) as caught:
                await transport.send(ask(server.url.replace("http:", "https:"), RequestKind.SUBMIT), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


async def test_a_proxy_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every user of httpx expects; NO_PROXY and `trust_env=False` turn it off."""
    with serving(saying(response(b"by proxy"))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "inside.example")
        async with contextlib.aclosing(HttpxTransport()) as transport:
            assert (await transport.send(ask("http://api.example/x"), timeout_s=5)).body == b"by proxy"
            with pytest.raises(ExchangeError):
                await transport.send(ask("http://inside.example/x"), timeout_s=5)
        async with contextlib.aclosing(HttpxTransport(trust_env=False)) as transport:
            with pytest.raises(ExchangeError):
                await transport.send(ask("http://api.example/x"), timeout_s=5)


async def test_nothing_of_a_request_is_in_what_a_failure_shows() -> None:
    """Not in its text, and not in the exceptions chained behind it."""
    key = "Bearer dk-CANARY"
    for headers in ({"Authorization": key}, {"Authorization": f"{key}\n"}, {"Authorization": f"{key}\u20ac"}):
        with serving(saying_then(socket.socket.close)) as server:
            async with contextlib.aclosing(HttpxTransport()) as transport:
                with pytest.raises(ExchangeError) as caught:
                    await transport.send(ask(server, RequestKind.SUBMIT, headers=headers), timeout_s=5)
        assert "CANARY" not in str(caught.value)
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None


async def test_the_tls_context_is_made_once_and_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 20 to 50 ms, and 64 lanes share it."""
    made = []

    def create(**settings: object) -> ssl.SSLContext:
        made.append(settings)
        return ssl.create_default_context()

    monkeypatch.setattr(httpx, "create_ssl_context", create)
    async with contextlib.aclosing(HttpxTransport()) as transport, anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(transport._tls_context)
    assert len(made) == 1


async def test_a_certificate_file_that_is_not_there_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was sent, and it will not get better."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent.pem")
    async with contextlib.aclosing(HttpxTransport()) as transport:
        with pytest.raises(ExchangeError, match="certificate file") as caught:
            await transport.send(ask("https://127.0.0.1:9/", RequestKind.SUBMIT), timeout_s=5)
    assert (caught.value.phase, caught.value.permanent) == (Phase.CONNECT, True)


@pytest.mark.parametrize("flaw", ["none", "wrong-host", "expired", "unknown-authority"])
async def test_a_certificate_that_does_not_fit_is_a_configuration_error(
    flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, without a retry, and the request stays here. One that fits is taken from SSL_CERT_FILE."""
    authority = trustme.CA()
    if flaw != "unknown-authority":
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    name = "other.example" if flaw == "wrong-host" else "127.0.0.1"
    past = datetime(2020, 1, 1, tzinfo=UTC) if flaw == "expired" else None
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_after=past).configure_cert(tls)
    with serving(saying(response(b"{}")), tls=tls) as server:
        async with contextlib.aclosing(HttpxTransport()) as transport:
            request = ask(server.url.replace("http:", "https:"), RequestKind.SUBMIT)
            if flaw == "none":
                assert (await transport.send(request, timeout_s=5)).status == 200
            else:
                with pytest.raises(ExchangeError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                    await transport.send(request, timeout_s=5)
                assert (caught.value.phase, caught.value.permanent, server.requests) == (Phase.CONNECT, True, [])
