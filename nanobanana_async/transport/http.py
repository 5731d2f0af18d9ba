"""`HttpTransport`: the one file that names httpx. Sockets, deadlines and phases; nothing about what is said.

One httpx pool with 64 connections costs 10-19 ms of CPU per request, for httpcore re-scans the pool on each event.
Here every request under way has a lane of its own: a transport with one connection. Lanes share one TLS context,
come from a stack (callers bound how many there are at once, so nobody queues here), and one that was cut off half
way is closed and forgotten, which is also what keeps cancelled requests from wedging anything.
"""

import ssl
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.request import getproxies, proxy_bypass

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import httpx

from nanobanana_async.errors import ConfigurationError
from nanobanana_async.models import http_url_fault
from nanobanana_async.transport.addresses import is_public, resolve
from nanobanana_async.transport.base import Errand, ExchangeFailed, Phase, Sink, WireReply, WireRequest

if TYPE_CHECKING:
    import httpx2

_SILENCE_S: Final = 30.0
"""How long a file host may say nothing before it is worth asking again."""
_ERROR_BYTES: Final = 2**20
"""Cap on the body of anything but a 200: nobody needs fifty megabytes of error page."""
_GOODBYE_S: Final = 2.0
"""Bound on closing one connection, which TLS peers may drag out."""
_YIELD_AFTER: Final = 256
"""Pieces of a body after which others get their turn: a peer may send one byte at a time, thousands at once."""
_REUSED: Final = httpx.Limits(max_connections=1, max_keepalive_connections=1)
_FRESH: Final = httpx.Limits(max_connections=1, max_keepalive_connections=0)
"""A lane that connects anew for each request."""
_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts no certificate at all: for lanes to plain http, which must have a context and never use it."""
_NEVER_SENT: Final = (
    "ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError",
    "InvalidURL", "UnsupportedProtocol", "LocalProtocolError",
)  # fmt: skip
_HOPELESS: Final = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")


@attrs.define
class _Progress:
    """What is known of one exchange while it runs, for whoever has to judge it if it breaks off."""

    phase: Phase = Phase.SEND
    """Assume the worst: only a trace may say that no byte has left yet."""
    reply: WireReply | None = None
    received: bytearray = attrs.field(factory=bytearray)
    in_sink: bool = False

    async def trace(self, event: str, _: Mapping[str, object]) -> None:
        """Follow httpcore's trace events (its documented `trace` extension)."""
        if event.endswith("connect_tcp.started"):
            self.phase = Phase.CONNECT
        elif event.endswith("send_request_headers.started"):
            self.phase = Phase.SEND

    def failed(self, reason: str, *, phase: Phase | None = None, permanent: bool = False) -> ExchangeFailed:
        reply = self.reply and attrs.evolve(self.reply, body=bytes(self.received))
        phase = self.phase if phase is None else phase
        return ExchangeFailed(reason, phase=phase, permanent=permanent, reply=reply)


@attrs.frozen
class _Target:
    """Where to connect for one request: with a pinned address, the name lives on in `Host` and in SNI."""

    url: httpx.URL
    headers: Mapping[str, str] = attrs.field(repr=False)
    extensions: Mapping[str, object]


class _Body(httpx.AsyncByteStream):
    """A request body in one piece.

    httpx's own is an async generator, left unfinished when writing fails, and trio complains about those.
    """

    def __init__(self, data: bytes | None) -> None:
        self._pieces = iter([data] if data else [])

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration


@lru_cache(4096)  # a task is asked about several times, and parsing costs a tenth of a request
def _parsed(text: str) -> httpx.URL | str:
    """Return the URL, or what is wrong with it."""
    if fault := http_url_fault(text):
        return f"the URL {fault}"
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as exc:
        return f"not a URL: {exc}"


def _built(request: WireRequest, target: _Target, extensions: dict[str, object]) -> httpx.Request:
    headers = {"Host": target.url.netloc.decode("ascii"), **target.headers}
    if request.body is not None:
        headers["Content-Length"] = str(len(request.body))
    stream = _Body(request.body)
    return httpx.Request(request.method, target.url, headers=headers, stream=stream, extensions=extensions)


@attrs.frozen
class _OwnLane:
    """One connection of ours."""

    transport: httpx.AsyncHTTPTransport

    async def open(self, request: WireRequest, target: _Target, extensions: dict[str, object]) -> httpx.Response:
        # Built in a call of its own, so that no frame of a suspended exchange has the headers among its variables.
        return await self.transport.handle_async_request(_built(request, target, extensions))

    async def aclose(self) -> None:
        with anyio.move_on_after(_GOODBYE_S, shield=True):
            await self.transport.aclose()


@attrs.frozen
class _LentLane:
    """The user's client, httpx's or httpx2's: what we call is the same on both."""

    client: "httpx.AsyncClient | httpx2.AsyncClient"

    async def open(
        self, request: WireRequest, target: _Target, extensions: dict[str, object]
    ) -> "httpx.Response | httpx2.Response":
        built = self.client.build_request(
            request.method, str(target.url), headers=target.headers, content=request.body, extensions=extensions
        )
        return await self.client.send(built, stream=True, auth=None, follow_redirects=False)  # type: ignore[arg-type]


class HttpTransport:
    """Carries requests over httpx, on asyncio and on trio.

    Args:
        client: An `httpx.AsyncClient` or `httpx2.AsyncClient` of yours (a proxy, a certificate, a test transport).
            It carries the API calls, stays yours to close, and its own pool decides what a submit rides on: leave it
            at least as many connections as `Limits` allows, and prefer no keep-alive. Pictures never travel by it.
        connect_s: How long making one connection may take, in seconds.
        trust_env: Whether proxies and certificates named in the environment are used (not for *client*). Behind a
            proxy it is the proxy that resolves names and connects: a picture's URL whose name does not resolve here is
            left to its judgement, so give it rules of its own about private addresses.
    """

    def __init__(
        self,
        client: "httpx.AsyncClient | httpx2.AsyncClient | None" = None,
        *,
        connect_s: float = 10.0,
        trust_env: bool = True,
    ) -> None:
        _check_client(client)
        self._client = client
        self._connect_s = connect_s
        self._trust_env = trust_env
        self._proxies = getproxies() if trust_env else {}
        self._idle: defaultdict[tuple[str, Errand], list[_OwnLane]] = defaultdict(list)
        """Lanes at rest, by origin, for another one may need another proxy, and by what they are for."""
        self._tls: ssl.SSLContext | None = None
        self._tls_lock = anyio.Lock()
        self._closed = False

    async def send(self, request: WireRequest, *, timeout_s: float, sink: Sink | None = None) -> WireReply:
        """See `Transport.send`."""
        failure = ExchangeFailed("the time was up before it began", phase=Phase.CONNECT)
        deadline = anyio.current_time() + timeout_s
        for target in await self._targets(request, timeout_s):
            time_left_s = deadline - anyio.current_time()
            if time_left_s <= 0:
                break
            outcome = await self._exchange(request, target, time_left_s, sink)
            if isinstance(outcome, WireReply):
                return outcome
            failure = outcome
            if failure.phase is not Phase.CONNECT or failure.permanent:
                break
        # Raised here, outside every except block: a foreign exception in `__context__` holds the request, key and all.
        raise failure

    async def aclose(self) -> None:
        """Close the lanes at rest, and those under way as they come back; a handed-in client stays open."""
        self._closed = True
        while self._idle:
            for lane in self._idle.popitem()[1]:
                await lane.aclose()

    async def _exchange(
        self, request: WireRequest, target: _Target, timeout_s: float, sink: Sink | None
    ) -> WireReply | ExchangeFailed:
        progress = _Progress()
        with anyio.move_on_after(timeout_s):
            try:
                async with self._lane(request) as lane:
                    return await self._converse(lane, request, target, timeout_s, progress, sink)
            except ExchangeFailed as exc:
                return exc
            except Exception as exc:
                if progress.in_sink:
                    raise
                return self._translate(exc, progress)
        return progress.failed(f"no whole reply within {timeout_s:.3g} s")

    async def _converse(
        self,
        lane: _OwnLane | _LentLane,
        request: WireRequest,
        target: _Target,
        timeout_s: float,
        progress: _Progress,
        sink: Sink | None,
    ) -> WireReply:
        # A timer per read would only repeat the total deadline, except where that one is long and a retry helps.
        silence_s = min(timeout_s, _SILENCE_S) if request.errand is Errand.FETCH else None
        extensions = {
            **target.extensions,
            "timeout": {"connect": self._connect_s, "read": silence_s, "write": silence_s, "pool": self._connect_s},
        }
        if request.errand is Errand.SUBMIT:
            extensions["trace"] = progress.trace
        response = await lane.open(request, target, extensions)
        progress.phase = Phase.REPLY
        progress.reply = WireReply(status=response.status_code, headers=dict(response.headers.items()))
        try:
            streamed = sink if response.status_code == 200 else None
            cap = request.max_bytes if response.status_code == 200 else min(request.max_bytes, _ERROR_BYTES)
            await _drain(response, cap, progress, streamed)
        finally:
            if not response.is_closed:
                with anyio.move_on_after(_GOODBYE_S, shield=True):
                    await response.aclose()
        return attrs.evolve(progress.reply, body=bytes(progress.received))

    @asynccontextmanager
    async def _lane(self, request: WireRequest) -> AsyncGenerator[_OwnLane | _LentLane]:
        """Lend a lane; it comes back to the stack only if the exchange came to its end."""
        if self._client is not None and request.errand is not Errand.FETCH:
            if self._client.is_closed:
                raise ExchangeFailed("the handed-in client is closed", phase=Phase.CONNECT, permanent=True)
            yield _LentLane(self._client)
            return
        origin = "/".join(request.url.split("/", 3)[:3])
        idle = self._idle[origin, request.errand] if request.errand is not Errand.FETCH else []
        lane = idle.pop() if idle else await self._new_lane(request)
        keep = False
        try:
            yield lane
            keep = request.errand is not Errand.FETCH and not self._closed
        finally:
            if keep:
                idle.append(lane)
            else:
                await lane.aclose()

    async def _new_lane(self, request: WireRequest) -> _OwnLane:
        proxy = self._proxy_for(request.url)
        limits = _REUSED if request.errand is Errand.READ else _FRESH
        try:
            tls = _NO_TLS if proxy is None and request.url.startswith("http://") else await self._tls_context()
            return _OwnLane(httpx.AsyncHTTPTransport(verify=tls, limits=limits, proxy=proxy))
        except (ImportError, ValueError, OSError) as exc:
            reason = f"a proxy or certificate file named in the environment cannot be used: {exc}"
        raise ExchangeFailed(reason, phase=Phase.CONNECT, permanent=True)

    def _proxy_for(self, url: str) -> str | None:
        if not self._proxies:
            return None
        scheme, _, rest = url.lower().partition("://")
        if proxy_bypass(rest.partition("/")[0]):
            return None
        return self._proxies.get(scheme) or self._proxies.get("all")

    async def _tls_context(self) -> ssl.SSLContext:
        """Make the one TLS context, off the loop: loading the certificates takes 20-50 ms."""
        async with self._tls_lock:
            if self._tls is None:
                self._tls = await anyio.to_thread.run_sync(lambda: httpx.create_ssl_context(trust_env=self._trust_env))
        return self._tls

    async def _targets(self, request: WireRequest, timeout_s: float) -> list[_Target]:
        """Return where to connect, in order. A guarded request dials the very address that was judged."""
        url = _parsed(request.url)
        if isinstance(url, str):
            raise ExchangeFailed(url, phase=Phase.CONNECT, permanent=True)
        if request.public_only:
            return await self._guarded(url, request.headers, timeout_s)
        return [_Target(url, request.headers, {})]

    async def _guarded(self, url: httpx.URL, headers: Mapping[str, str], timeout_s: float) -> list[_Target]:
        host = url.raw_host.decode("ascii")
        addresses: list[str] = []
        reason = f"{host} does not resolve in time"
        with anyio.move_on_after(min(timeout_s, self._connect_s)):
            try:
                addresses = await resolve(host, url.port or (443 if url.scheme == "https" else 80))
            except (OSError, UnicodeError) as exc:
                reason = f"{host} does not resolve: {exc}"
        if refused := next((address for address in addresses if not is_public(address)), None):
            raise ExchangeFailed(
                f"{host} leads to {refused}, which is not a public address", phase=Phase.CONNECT, permanent=True
            )
        if self._proxy_for(str(url)):
            return [_Target(url, headers, {})]  # the proxy resolves and connects; it may know names that we do not
        if not addresses:
            raise ExchangeFailed(reason, phase=Phase.CONNECT)
        pinned = {**headers, "Host": url.netloc.decode("ascii")}
        return [_Target(url.copy_with(host=address), pinned, {"sni_hostname": host}) for address in addresses]

    def _translate(self, exc: Exception, progress: _Progress) -> ExchangeFailed:
        """Say in our words what a foreign exception means. Its text is kept, the exception is not."""
        name = next((c.__name__ for c in type(exc).__mro__ if c.__name__ in _NEVER_SENT), "")
        sent = not name and not isinstance(exc, UnicodeEncodeError)
        causes = list(_causes(exc))
        bad_tls = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes) or any(
            getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER" for cause in causes
        )
        # Messages of these two may quote a header or a body, so only their names are told.
        quotes = name == "LocalProtocolError" or isinstance(exc, UnicodeEncodeError)
        detail = "" if quotes else str(causes[-1]) or str(exc)
        reason = f"{type(exc).__name__}: {detail}".removesuffix(": ")
        if sent:
            return progress.failed(reason)
        permanent = bad_tls or name in _HOPELESS or (name == "ProxyError" and "407" in str(exc))
        return progress.failed(reason, phase=Phase.CONNECT, permanent=permanent)


async def _drain(
    response: "httpx.Response | httpx2.Response", max_bytes: int, progress: _Progress, sink: Sink | None
) -> None:
    """Read the body raw, so that what came before a failure is kept, and stop at the cap.

    When we are the ones to stop, the connection is closed and the iteration goes on to its end, which is near: left
    half way, the libraries' nested generators would be finalised by the garbage collector, and trio complains.
    """
    size, pieces, stopped = 0, 0, None
    try:
        async for piece in response.aiter_raw():
            pieces += 1
            if pieces % _YIELD_AFTER == 0:
                await anyio.lowlevel.checkpoint()
            if stopped is not None:
                continue
            size += len(piece)
            try:
                await _take(piece, size - max_bytes, progress, sink)
            except Exception as exc:  # noqa: BLE001 - raised again below, when the body is done with
                stopped = exc
                await response.aclose()
    except Exception:  # reading on after our own close fails in as many ways as there are backends
        if stopped is None:
            raise
    if stopped is not None:
        raise stopped


async def _take(piece: bytes, excess: int, progress: _Progress, sink: Sink | None) -> None:
    if excess > 0:
        if sink is None:
            progress.received += piece[:-excess]
        raise progress.failed("the body is longer than may be read", permanent=True)
    if sink is None:
        progress.received += piece
        return
    progress.in_sink = True
    await sink(piece)
    progress.in_sink = False


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = exc
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _check_client(client: object) -> None:
    """Refuse what is neither library's AsyncClient; a sync client would fail only at the first request."""
    if client is not None and not any(
        base.__name__ == "AsyncClient" and base.__module__.partition(".")[0] in ("httpx", "httpx2")
        for base in type(client).__mro__
    ):
        found = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ConfigurationError(f"client: expected httpx.AsyncClient or httpx2.AsyncClient, got {found}")
