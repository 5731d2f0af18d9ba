"""`HttpxTransport`: requests over httpx. It handles sockets, deadlines and phases, and does not interpret contents.

One httpx pool with 64 connections costs 10-19 ms of CPU per request, because httpcore re-scans the pool at each event.
Here every request in flight has a connection of its own. Connections share one TLS context. Idle ones are kept on a
stack. The caller bounds their number, so nothing queues here. A connection that was interrupted is closed, so a
cancelled request cannot block later ones.
"""

import contextlib
import ssl
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import httpx

from nanobanana_async._concurrency.timeouts import run_within
from nanobanana_async.protocols import ExchangeError, Phase, RequestKind, WireRequest, WireResponse
from nanobanana_async.transport._connections import (
    ClientConnection,
    Connection,
    Destination,
    DirectConnection,
    ProxyConnection,
    StreamingResponse,
    check_client,
    import_httpcore,
    parse_url,
)
from nanobanana_async.transport.addresses import resolve
from nanobanana_async.transport.proxies import Proxies, masked
from nanobanana_async.wire.addresses import is_fake_ip, is_public, parse_literal

if TYPE_CHECKING:
    import httpx2

_READ_TIMEOUT_S: Final = 30.0
"""How long a file host may send nothing before a retry helps."""
_MIN_BYTES_PER_S: Final = 1024
"""Least rate of a download. A slower one holds a slot that others need."""
_RATE_WINDOW_S: Final = 10.0
"""How long the rate is measured."""
_GROWTH_BYTES: Final = 2**20
_MAX_ERROR_BODY_BYTES: Final = 2**20
"""Largest body of a response other than a 200."""
_YIELD_AFTER_CHUNKS: Final = 256
"""Number of chunks after which other tasks run. A peer may send thousands of chunks of one byte."""
_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context that trusts no certificate, for plain http, where one is required and not used."""
_CONNECT_ERRORS: Final = (
    "ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError",
    "InvalidURL", "UnsupportedProtocol", "LocalProtocolError",
)  # fmt: skip
_PERMANENT_ERRORS: Final = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")


@attrs.define
class _ExchangeState:
    """The state of one exchange, kept to classify a failure."""

    phase: Phase = Phase.CONNECT
    """`SEND` from when a connection has the request, until a trace event proves that no byte was sent."""
    response: WireResponse | None = None
    received: bytearray = attrs.field(factory=bytearray)

    async def trace(self, event: str, info: Mapping[str, object]) -> None:
        """Handle httpcore's trace events (its documented `trace` extension)."""
        if event.endswith("connect_tcp.started"):
            self.phase = Phase.CONNECT
        elif event.endswith("send_request_headers.started") and not _is_tunnel(info.get("request")):
            self.phase = Phase.SEND

    def to_error(self, reason: str, *, phase: Phase | None = None, permanent: bool = False) -> ExchangeError:
        response = self.response and attrs.evolve(self.response, body=bytes(self.received))
        phase = self.phase if phase is None else phase
        return ExchangeError(reason, phase=phase, permanent=permanent, response=response)


def _is_tunnel(request: object) -> bool:
    """Return whether *request* is a CONNECT to a proxy, which carries nothing of our request."""
    return getattr(request, "method", b"") == b"CONNECT"


class HttpxTransport:
    """Sends requests over httpx, on asyncio and on trio.

    Args:
        client: Your own `httpx.AsyncClient` or `httpx2.AsyncClient`, for a proxy, a certificate or a test. It sends the
            API calls, and you close it. Its pool chooses the connection of a submit: allow at least as many
            connections as `Limits` does, and prefer no keep-alive. It never downloads images.
        connect_s: Timeout of one connection attempt, in seconds.
        trust_env: Whether to use proxies and certificates from the environment; not used with *client*. A proxy
            resolves names itself, so configure it to refuse private addresses.
        proxy: URL of a proxy for all connections of the transport, instead of those of the environment. With *client*,
            for images only.
        verify: TLS context for all connections of the transport; None trusts the usual certificates. With *client*, for
            images only.
        check_addresses: Whether to refuse image hosts at addresses that are not public. If the name of the service
            leads to 198.18.0.0/15, as with a transparent proxy, other names may, too.
    """

    def __init__(
        self,
        client: "httpx.AsyncClient | httpx2.AsyncClient | None" = None,
        *,
        connect_s: float = 10.0,
        trust_env: bool = True,
        proxy: str | None = None,
        verify: ssl.SSLContext | None = None,
        check_addresses: bool = True,
    ) -> None:
        check_client(client)
        self._client = client
        self._connect_s = connect_s
        self._trust_env = trust_env
        self._check_addresses = check_addresses
        self._service_host: str | None = None
        """Host of the last API call."""
        self._has_fake_ips: bool | None = None
        self._proxies = Proxies(proxy, trust_env=trust_env)
        self._idle_connections: defaultdict[tuple[str, bool], list[Connection]] = defaultdict(list)
        """Idle connections by origin, and by whether its addresses were checked."""
        self._tls: ssl.SSLContext | None = verify
        self._tls_lock = anyio.Lock()
        self._closed = False

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """See `Transport.send`."""
        deadline_s = anyio.current_time() + timeout_s
        target = await self._destination(request, timeout_s)
        outcome = await self._send_to(request, target, deadline_s - anyio.current_time())
        if isinstance(outcome, WireResponse):
            return outcome
        # Raised outside every except block: an exception in `__context__` would hold the request with the key.
        raise outcome

    async def aclose(self) -> None:
        """Close idle connections now, and others when they are returned. A client that you passed stays open."""
        self._closed = True
        while self._idle_connections:
            for connection in self._idle_connections.popitem()[1]:
                await connection.aclose()

    async def close_expired(self) -> None:
        """Close idle connections that the server has closed, or that were idle for two minutes."""
        for key, idle in list(self._idle_connections.items()):
            expired = [connection for connection in idle if not connection.is_reusable]
            self._idle_connections[key] = [connection for connection in idle if connection not in expired]
            for connection in expired:
                await connection.aclose()
            if not self._idle_connections.get(key):
                self._idle_connections.pop(key, None)

    async def _send_to(
        self, request: WireRequest, target: Destination, timeout_s: float
    ) -> WireResponse | ExchangeError:
        progress = _ExchangeState()
        outcome: WireResponse | ExchangeError | None = None

        async def work() -> None:
            nonlocal outcome
            outcome = await self._exchange(request, target, timeout_s, progress)

        if request.kind is RequestKind.SUBMIT:  # its response may have arrived while the process was stopped
            await run_within(timeout_s, work)
        else:
            with anyio.move_on_after(timeout_s):
                await work()
        return outcome or progress.to_error(f"no complete response within {timeout_s:.3g} s")

    async def _exchange(
        self, request: WireRequest, target: Destination, timeout_s: float, progress: _ExchangeState
    ) -> WireResponse | ExchangeError:
        try:
            connection = await self._acquire_connection(request, target)
            progress.phase = Phase.SEND
            keep = False
            try:
                response = await self._send_and_read(connection, request, target, timeout_s, progress)
                keep = request.kind is not RequestKind.SUBMIT and connection.is_own and not self._closed
                return response
            finally:
                if keep:
                    self._idle_connections[_pool_key(request)].append(connection)
                else:
                    await connection.aclose()
        except ExchangeError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - mapped, whatever the library raises
            return self._map_exception(exc, progress)

    async def _send_and_read(
        self,
        connection: Connection,
        request: WireRequest,
        target: Destination,
        timeout_s: float,
        progress: _ExchangeState,
    ) -> WireResponse:
        # A timeout per read only helps where the total deadline is long and a retry is possible.
        read_timeout_s = min(timeout_s, _READ_TIMEOUT_S) if request.kind is RequestKind.DOWNLOAD else None
        extensions: dict[str, object] = {
            "timeout": {
                "connect": self._connect_s,
                "read": read_timeout_s,
                "write": read_timeout_s,
                "pool": self._connect_s,
            },
        }
        if request.kind is RequestKind.SUBMIT:
            extensions["trace"] = progress.trace
        streaming = await connection.send(request, target, extensions)
        progress.phase = Phase.RESPONSE
        progress.response = WireResponse(status=streaming.status, headers=streaming.headers)
        try:
            cap = request.max_bytes if streaming.status == 200 else min(request.max_bytes, _MAX_ERROR_BODY_BYTES)
            if request.before_body is not None and streaming.status == 200:
                await request.before_body(progress.response)
            on_growth = None
            if request.before_body is not None and "content-length" not in streaming.headers:
                unstated = {**streaming.headers, "content-length": str(request.max_bytes)}
                on_growth = partial(request.before_body, attrs.evolve(progress.response, headers=unstated))
            watch = _BodyWatch(_MIN_BYTES_PER_S if read_timeout_s else 0, on_growth, anyio.current_time())
            await _read_body(streaming, cap, progress, watch)
        finally:
            await streaming.aclose()
        return attrs.evolve(progress.response, body=bytes(progress.received))

    async def _acquire_connection(self, request: WireRequest, target: Destination) -> Connection:
        """Return an idle connection if *request* may reuse one, else a new connection."""
        if self._client is not None and request.kind is not RequestKind.DOWNLOAD:
            if self._client.is_closed:
                raise ExchangeError(
                    "client: expected an open client, got a closed one", phase=Phase.CONNECT, permanent=True
                )
            return ClientConnection(self._client)
        idle = [] if request.kind is RequestKind.SUBMIT else self._idle_connections[_pool_key(request)]
        while idle:
            connection = idle.pop()
            if connection.is_reusable:
                return connection
            await connection.aclose()
        proxy = self._proxies.for_url(request.url)
        await import_httpcore()
        try:
            tls = _NO_TLS if proxy is None and request.url.startswith("http://") else await self._tls_context()
            return DirectConnection(target, tls) if proxy is None else ProxyConnection(proxy, tls)
        except OSError as exc:
            reason = f"a certificate file named in the environment cannot be used: {exc}"
        except ImportError as exc:
            reason = f"the proxy {masked(proxy or '')} cannot be used: {exc}"
        except (ValueError, httpx.InvalidURL):  # their texts may quote the password
            reason = f"the proxy {masked(proxy or '')} cannot be used. Expected a URL such as http://127.0.0.1:3128"
        raise ExchangeError(reason, phase=Phase.CONNECT, permanent=True)

    async def _tls_context(self) -> ssl.SSLContext:
        """Return the shared TLS context, created in a thread: loading the certificates takes 20-50 ms."""
        async with self._tls_lock:
            if self._tls is None:
                self._tls = await anyio.to_thread.run_sync(lambda: httpx.create_ssl_context(trust_env=self._trust_env))
        return self._tls

    async def _destination(self, request: WireRequest, timeout_s: float) -> Destination:
        """Return where to connect. A guarded request connects to the addresses that were checked."""
        url = parse_url(request.url)
        if isinstance(url, str):
            raise ExchangeError(url, phase=Phase.CONNECT, permanent=True)
        if request.kind is not RequestKind.DOWNLOAD:
            self._service_host = url.host
        if request.public_only and self._check_addresses:
            return await self._resolve_public(url, request.headers, timeout_s)
        return Destination(url, request.headers)

    async def _resolve_public(self, url: httpx.URL, headers: Mapping[str, str], timeout_s: float) -> Destination:
        host = url.raw_host.decode("ascii")
        if self._proxies.for_url(str(url)) and parse_literal(host) is None:
            return Destination(url, headers)  # the proxy resolves: answers of this resolver say nothing
        addresses: list[str] = []
        reason = f"{host} does not resolve in time"
        with anyio.move_on_after(min(timeout_s, self._connect_s)):
            try:
                addresses = await resolve(host, url.port or (443 if url.scheme == "https" else 80))
            except (OSError, UnicodeError) as exc:
                reason = f"{host} does not resolve: {exc}"
        for address in addresses:
            is_allowed = is_public(address) or (
                is_fake_ip(address) and parse_literal(host) is None and await self._is_behind_fake_ips()
            )
            if not is_allowed:
                raise ExchangeError(
                    f"{host} leads to {address}, which is not a public address. If your network is meant to do that, "
                    "pass transport=HttpxTransport(check_addresses=False)",
                    phase=Phase.CONNECT,
                    permanent=True,
                )
        if not addresses:
            raise ExchangeError(reason, phase=Phase.CONNECT)
        return Destination(url, headers, tuple(addresses))

    async def _is_behind_fake_ips(self) -> bool:
        """Return whether the name of the service leads to a fake address, too."""
        if self._has_fake_ips is None and self._service_host is not None:
            with contextlib.suppress(OSError, UnicodeError):
                self._has_fake_ips = any(map(is_fake_ip, await resolve(self._service_host, 443)))
        return bool(self._has_fake_ips)

    def _map_exception(self, exc: Exception, progress: _ExchangeState) -> ExchangeError:
        """Return the package's error for a library's exception. Its text is kept, the exception is not."""
        name = next((c.__name__ for c in type(exc).__mro__ if c.__name__ in _CONNECT_ERRORS), "")
        sent = not name and not isinstance(exc, UnicodeEncodeError)
        causes = list(_cause_chain(exc))
        bad_tls = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes) or any(
            getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER" for cause in causes
        )
        # Messages of these two may quote a header or a body, so only their names are used.
        quotes = name == "LocalProtocolError" or isinstance(exc, UnicodeEncodeError)
        detail = "" if quotes else str(causes[-1]) or str(exc)
        reason = f"{type(exc).__name__}: {detail}".removesuffix(": ")
        if sent:
            return progress.to_error(reason)
        permanent = bad_tls or name in _PERMANENT_ERRORS or (name == "ProxyError" and "407" in str(exc))
        return progress.to_error(reason, phase=Phase.CONNECT, permanent=permanent)


@attrs.define
class _BodyWatch:
    """What is checked while a body arrives: its rate, in windows of ten seconds, and memory if it states no length."""

    min_bytes_per_s: int
    on_growth: Callable[[], Awaitable[None]] | None
    """Awaited once a MiB has arrived."""
    since_s: float
    since_bytes: int = 0

    async def problem(self, received_bytes: int) -> str | None:
        """Return why the body is not read any further; None if it is."""
        if self.on_growth is not None and received_bytes > _GROWTH_BYTES:
            await self.on_growth()
            self.on_growth, self.since_s = None, anyio.current_time()
        took_s = anyio.current_time() - self.since_s
        if took_s < _RATE_WINDOW_S:
            return None
        is_slow = received_bytes - self.since_bytes < self.min_bytes_per_s * took_s
        self.since_s, self.since_bytes = self.since_s + took_s, received_bytes
        return f"the body arrives at less than {self.min_bytes_per_s} bytes per second" if is_slow else None


async def _read_body(streaming: StreamingResponse, max_bytes: int, progress: _ExchangeState, watch: _BodyWatch) -> None:
    """Read the body raw, so that bytes received before a failure are kept, and stop at the limit or at a problem.

    If the reading stops early, the connection is closed and the iteration continues to its end. Otherwise the garbage
    collector would finalize the libraries' nested generators, and trio warns about that.
    """
    chunks, left = 0, max_bytes
    stopped: BaseException | None = None
    try:
        async for chunk in streaming.chunks:
            chunks += 1
            if chunks % _YIELD_AFTER_CHUNKS == 0:
                await anyio.lowlevel.cancel_shielded_checkpoint()
            if stopped is not None:
                continue
            progress.received += chunk[:left]
            left -= len(chunk)
            if (problem := await watch.problem(len(progress.received))) is not None:
                stopped = progress.to_error(problem)
            if left < 0:
                stopped = progress.to_error("the body exceeds the limit", permanent=True)
            if stopped is not None:
                await streaming.aclose()
    except Exception:  # reading after the close fails differently on each backend
        if stopped is None:
            raise
    if stopped is not None:
        raise stopped


def _pool_key(request: WireRequest) -> tuple[str, bool]:
    """Return what requests that may share a connection have in common: the origin, and whether it was checked."""
    return "/".join(request.url.split("/", 3)[:3]), request.public_only


def _cause_chain(exc: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = exc
    while isinstance(seen, Exception):  # a cancellation is not useful to the reader
        yield seen
        seen = seen.__cause__ or seen.__context__
