"""`HttpxTransport`: requests over httpx. It handles sockets, deadlines and phases, and does not interpret contents.

One httpx pool with 64 connections costs 10-19 ms of CPU per request, because httpcore re-scans the pool at each event.
Here every request in flight has a connection of its own. Connections share one TLS context. Idle ones are kept on a
stack. The caller bounds their number, so nothing queues here. A connection that was interrupted is closed, so a
cancelled request cannot block later ones.
"""

import ssl
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
import httpx

from nanobanana_async.protocols import ExchangeError, Phase, RequestKind, WireRequest, WireResponse
from nanobanana_async.transport._connections import (
    ClientConnection,
    Connection,
    Destination,
    DirectConnection,
    ProxyConnection,
    TlsContext,
    check_client,
    import_httpcore,
    parse_url,
)
from nanobanana_async.transport._exchange import (
    READ_TIMEOUT_S,
    ExchangeState,
    cause_chain,
    is_bad_tls,
    read_response,
    run_exchange,
)
from nanobanana_async.transport.addresses import AddressCheck
from nanobanana_async.transport.proxies import Proxies, masked
from nanobanana_async.wire.addresses import parse_literal

if TYPE_CHECKING:
    import httpx2

_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context that trusts no certificate, for plain http, where one is required and not used."""
_CONNECT_ERRORS: Final = (
    "ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError",
    "InvalidURL", "UnsupportedProtocol", "LocalProtocolError",
)  # fmt: skip
_PERMANENT_ERRORS: Final = ("InvalidURL", "UnsupportedProtocol", "LocalProtocolError")


async def _follow(state: ExchangeState, event: str, info: Mapping[str, object]) -> None:
    """Set the phase from httpcore's trace events (its documented `trace` extension)."""
    if event.endswith("connect_tcp.started"):
        state.phase = Phase.CONNECT
    elif event.endswith("send_request_headers.started") and not _is_tunnel(info.get("request")):
        state.phase = Phase.SEND


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
        self._address_check = AddressCheck(type(self).__name__) if check_addresses else None
        self._proxies = Proxies(proxy, trust_env=trust_env)
        self._idle_connections: defaultdict[tuple[str, bool], list[Connection]] = defaultdict(list)
        """Idle connections by origin, and by whether its addresses were checked."""
        self._tls = TlsContext(verify, trust_env=trust_env)
        self._closed = False

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """See `Transport.send`."""
        deadline_s = anyio.current_time() + timeout_s
        target = await self._destination(request, timeout_s)
        timeout_s = deadline_s - anyio.current_time()
        return await run_exchange(request.kind, timeout_s, partial(self._exchange, request, target, timeout_s))

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

    async def _exchange(
        self, request: WireRequest, target: Destination, timeout_s: float, state: ExchangeState
    ) -> WireResponse | ExchangeError:
        try:
            connection = await self._acquire_connection(request, target)
            await anyio.lowlevel.checkpoint_if_cancelled()  # the time may be up: a thread is waited for to its end
            state.phase = Phase.SEND  # until a trace event proves that no byte was sent
            keep = False
            try:
                response = await self._send_and_read(connection, request, target, timeout_s, state)
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
            return _to_exchange_error(exc, state)

    async def _send_and_read(
        self,
        connection: Connection,
        request: WireRequest,
        target: Destination,
        timeout_s: float,
        state: ExchangeState,
    ) -> WireResponse:
        # A timeout per read only helps where the total deadline is long and a retry is possible.
        read_timeout_s = min(timeout_s, READ_TIMEOUT_S) if request.kind is RequestKind.DOWNLOAD else None
        extensions: dict[str, object] = {
            "timeout": {
                "connect": self._connect_s,
                "read": read_timeout_s,
                "write": read_timeout_s,
                "pool": self._connect_s,
            },
        }
        if request.kind is RequestKind.SUBMIT:
            extensions["trace"] = partial(_follow, state)
        return await read_response(await connection.send(request, target, extensions), request, state)

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
            tls = _NO_TLS if proxy is None and request.url.startswith("http://") else await self._tls.get()
            return DirectConnection(target, tls) if proxy is None else ProxyConnection(proxy, tls)
        except OSError as exc:
            reason = f"a certificate file named in the environment cannot be used: {exc}"
        except ImportError as exc:
            reason = f"the proxy {masked(proxy or '')} cannot be used: {exc}"
        except (ValueError, httpx.InvalidURL):  # their texts may quote the password
            reason = f"the proxy {masked(proxy or '')} cannot be used. Expected a URL such as http://127.0.0.1:3128"
        raise ExchangeError(reason, phase=Phase.CONNECT, permanent=True)

    async def _destination(self, request: WireRequest, timeout_s: float) -> Destination:
        """Return where to connect. A guarded request connects to the addresses that were checked."""
        url = parse_url(request.url)
        if isinstance(url, str):
            raise ExchangeError(url, phase=Phase.CONNECT, permanent=True)
        if request.kind is not RequestKind.DOWNLOAD and self._address_check is not None:
            self._address_check.service_host = url.host
        if not request.public_only or self._address_check is None:
            return Destination(url, request.headers)
        host = url.raw_host.decode("ascii")
        if self._proxies.for_url(request.url) and parse_literal(host) is None:
            return Destination(url, request.headers)  # the proxy resolves: answers of this resolver say nothing
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._address_check.resolve(host, port, min(timeout_s, self._connect_s))
        return Destination(url, request.headers, addresses)


def _to_exchange_error(exc: Exception, state: ExchangeState) -> ExchangeError:
    """Return the package's error for a library's exception. Its text is kept, the exception is not."""
    name = next((c.__name__ for c in type(exc).__mro__ if c.__name__ in _CONNECT_ERRORS), "")
    sent = not name and not isinstance(exc, UnicodeEncodeError)
    causes = list(cause_chain(exc))
    # Messages of these two may quote a header or a body, so only their names are used.
    quotes = name == "LocalProtocolError" or isinstance(exc, UnicodeEncodeError)
    detail = "" if quotes else str(causes[-1]) or str(exc)
    reason = f"{type(exc).__name__}: {detail}".removesuffix(": ")
    if sent:
        return state.to_error(reason)
    permanent = is_bad_tls(exc) or name in _PERMANENT_ERRORS or (name == "ProxyError" and "407" in str(exc))
    return state.to_error(reason, phase=Phase.CONNECT, permanent=permanent)


def _pool_key(request: WireRequest) -> tuple[str, bool]:
    """Return what requests that may share a connection have in common: the origin, and whether it was checked."""
    return "/".join(request.url.split("/", 3)[:3]), request.public_only
