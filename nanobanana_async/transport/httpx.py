"""`HttpxTransport`: requests over httpx. Sockets, deadlines and phases; nothing about what is said.

One httpx pool with 64 connections costs 10-19 ms of CPU per request, for httpcore re-scans the pool on each event.
Here every request under way has a lane of its own, with one connection. Lanes share one TLS context, come from a
stack (callers bound how many there are at once, so nobody queues here), and one that was cut off half way is closed
and forgotten, which is also what keeps cancelled requests from wedging anything.
"""

import ssl
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.request import getproxies, proxy_bypass

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import httpx

from nanobanana_async.models import http_url_fault
from nanobanana_async.protocols import ChunkSink, ExchangeError, Phase, RequestKind, WireRequest, WireResponse
from nanobanana_async.transport._connections import (
    ClientConnection,
    Connection,
    Destination,
    DirectConnection,
    ProxyConnection,
    StreamingResponse,
    check_client,
    load_engine,
)
from nanobanana_async.transport.addresses import is_public, resolve

if TYPE_CHECKING:
    import httpx2

_SILENCE_S: Final = 30.0
"""How long a file host may say nothing before it is worth asking again."""
_ERROR_BYTES: Final = 2**20
"""Cap on the body of anything but a 200: nobody needs fifty megabytes of error page."""
_YIELD_AFTER: Final = 256
"""Pieces of a body after which others get their turn: a peer may send one byte at a time, thousands at once."""
_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts no certificate at all: for lanes to plain http, which must have a context and never use it."""
_NEVER_SENT: Final = (
    "ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError",
    "InvalidURL", "UnsupportedProtocol", "LocalProtocolError",
)  # fmt: skip
_HOPELESS: Final = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")


@attrs.define
class _ExchangeState:
    """What is known of one exchange while it runs, for whoever has to judge it if it breaks off."""

    phase: Phase = Phase.SEND
    """Assume the worst: only a trace may say that no byte has left yet."""
    reply: WireResponse | None = None
    received: bytearray = attrs.field(factory=bytearray)
    in_sink: bool = False

    async def trace(self, event: str, _: Mapping[str, object]) -> None:
        """Follow httpcore's trace events (its documented `trace` extension)."""
        if event.endswith("connect_tcp.started"):
            self.phase = Phase.CONNECT
        elif event.endswith("send_request_headers.started"):
            self.phase = Phase.SEND

    def failed(self, reason: str, *, phase: Phase | None = None, permanent: bool = False) -> ExchangeError:
        reply = self.reply and attrs.evolve(self.reply, body=bytes(self.received))
        phase = self.phase if phase is None else phase
        return ExchangeError(reason, phase=phase, permanent=permanent, reply=reply)


@lru_cache(2048)  # a task is asked about several times, and parsing costs a tenth of a request
def _parsed(text: str) -> httpx.URL | str:
    """Return the URL, or what is wrong with it."""
    if fault := http_url_fault(text):
        return f"the URL {fault}"
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as exc:
        return f"not a URL: {exc}"


class HttpxTransport:
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
        check_client(client)
        self._client = client
        self._connect_s = connect_s
        self._trust_env = trust_env
        self._proxies = getproxies() if trust_env else {}
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)
        """Lanes at rest, by origin."""
        self._tls: ssl.SSLContext | None = None
        self._tls_lock = anyio.Lock()
        self._closed = False

    async def send(self, request: WireRequest, *, timeout_s: float, sink: ChunkSink | None = None) -> WireResponse:
        """See `Transport.send`."""
        failure = ExchangeError("the time was up before it began", phase=Phase.CONNECT)
        deadline = anyio.current_time() + timeout_s
        for target in await self._targets(request, timeout_s):
            time_left_s = deadline - anyio.current_time()
            if time_left_s <= 0:
                break
            outcome = await self._exchange(request, target, time_left_s, sink)
            if isinstance(outcome, WireResponse):
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
        self, request: WireRequest, target: Destination, timeout_s: float, sink: ChunkSink | None
    ) -> WireResponse | ExchangeError:
        progress = _ExchangeState()
        with anyio.move_on_after(timeout_s):
            try:
                lane = await self._take_lane(request, target)
                keep = False
                try:
                    reply = await self._converse(lane, request, target, timeout_s, progress, sink)
                    keep = request.errand is RequestKind.READ and self._client is None and not self._closed
                    return reply
                finally:
                    if keep:
                        self._idle[_origin(request)].append(lane)
                    else:
                        await lane.aclose()
            except ExchangeError as exc:
                return exc
            except Exception as exc:
                if progress.in_sink:
                    raise
                return self._translate(exc, progress)
        return progress.failed(f"no whole reply within {timeout_s:.3g} s")

    async def _converse(
        self,
        lane: Connection,
        request: WireRequest,
        target: Destination,
        timeout_s: float,
        progress: _ExchangeState,
        sink: ChunkSink | None,
    ) -> WireResponse:
        # A timer per read would only repeat the total deadline, except where that one is long and a retry helps.
        silence_s = min(timeout_s, _SILENCE_S) if request.errand is RequestKind.FETCH else None
        extensions = {
            **target.extensions,
            "timeout": {"connect": self._connect_s, "read": silence_s, "write": silence_s, "pool": self._connect_s},
        }
        if request.errand is RequestKind.SUBMIT:
            extensions["trace"] = progress.trace
        opened = await lane.open(request, target, extensions)
        progress.phase = Phase.REPLY
        progress.reply = WireResponse(status=opened.status, headers=opened.headers)
        try:
            streamed = sink if opened.status == 200 else None
            cap = request.max_bytes if opened.status == 200 else min(request.max_bytes, _ERROR_BYTES)
            await _drain(opened, cap, progress, streamed)
        finally:
            await opened.aclose()
        return attrs.evolve(progress.reply, body=bytes(progress.received))

    async def _take_lane(self, request: WireRequest, target: Destination) -> Connection:
        """Return a lane at rest, if *request* may ride on a connection that was used before, or a new one."""
        if self._client is not None and request.errand is not RequestKind.FETCH:
            if self._client.is_closed:
                raise ExchangeError("the handed-in client is closed", phase=Phase.CONNECT, permanent=True)
            return ClientConnection(self._client)
        idle = self._idle[_origin(request)] if request.errand is RequestKind.READ else []
        while idle:
            lane = idle.pop()
            if lane.is_ready:
                return lane
            await lane.aclose()
        proxy = self._proxy_for(request.url)
        await load_engine()
        try:
            tls = _NO_TLS if proxy is None and request.url.startswith("http://") else await self._tls_context()
            return DirectConnection(target.url, tls) if proxy is None else ProxyConnection(proxy, tls)
        except (ImportError, ValueError, OSError) as exc:
            reason = f"a proxy or certificate file named in the environment cannot be used: {exc}"
        raise ExchangeError(reason, phase=Phase.CONNECT, permanent=True)

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

    async def _targets(self, request: WireRequest, timeout_s: float) -> list[Destination]:
        """Return where to connect, in order. A guarded request dials the very address that was judged."""
        url = _parsed(request.url)
        if isinstance(url, str):
            raise ExchangeError(url, phase=Phase.CONNECT, permanent=True)
        if request.public_only:
            return await self._guarded(url, request.headers, timeout_s)
        return [Destination(url, request.headers, {})]

    async def _guarded(self, url: httpx.URL, headers: Mapping[str, str], timeout_s: float) -> list[Destination]:
        host = url.raw_host.decode("ascii")
        addresses: list[str] = []
        reason = f"{host} does not resolve in time"
        with anyio.move_on_after(min(timeout_s, self._connect_s)):
            try:
                addresses = await resolve(host, url.port or (443 if url.scheme == "https" else 80))
            except (OSError, UnicodeError) as exc:
                reason = f"{host} does not resolve: {exc}"
        if refused := next((address for address in addresses if not is_public(address)), None):
            raise ExchangeError(
                f"{host} leads to {refused}, which is not a public address", phase=Phase.CONNECT, permanent=True
            )
        if self._proxy_for(str(url)):
            return [Destination(url, headers, {})]  # the proxy resolves and connects; it may know names that we do not
        if not addresses:
            raise ExchangeError(reason, phase=Phase.CONNECT)
        pinned = {**headers, "Host": url.netloc.decode("ascii")}
        return [Destination(url.copy_with(host=address), pinned, {"sni_hostname": host}) for address in addresses]

    def _translate(self, exc: Exception, progress: _ExchangeState) -> ExchangeError:
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


async def _drain(opened: StreamingResponse, max_bytes: int, progress: _ExchangeState, sink: ChunkSink | None) -> None:
    """Read the body raw, so that what came before a failure is kept, and stop at the cap.

    When we are the ones to stop, or are cancelled, the connection is closed and the iteration goes on to its end, which
    is near: left half way, the libraries' nested generators would be finalised by the garbage collector, and trio
    complains.
    """
    size, pieces = 0, 0
    stopped: BaseException | None = None
    try:
        async for piece in opened.pieces:
            pieces += 1
            if pieces % _YIELD_AFTER == 0:
                await anyio.lowlevel.cancel_shielded_checkpoint()
            if stopped is not None:
                continue
            size += len(piece)
            try:
                await _take(piece, size - max_bytes, progress, sink)
            except BaseException as exc:  # noqa: BLE001 - raised again below, when the body is done with
                stopped = exc
                await opened.aclose()
    except Exception:  # reading on after our own close fails in as many ways as there are backends
        if stopped is None:
            raise
    if stopped is not None:
        raise stopped


async def _take(piece: bytes, excess: int, progress: _ExchangeState, sink: ChunkSink | None) -> None:
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


def _origin(request: WireRequest) -> str:
    return "/".join(request.url.split("/", 3)[:3])


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = exc
    while isinstance(seen, Exception):  # a cancellation says nothing that anybody would understand
        yield seen
        seen = seen.__cause__ or seen.__context__
