"""`AiohttpTransport`: requests over aiohttp, on asyncio. With the extra `aiohttp`; the only file that names aiohttp.

A poll costs a quarter of the CPU that it costs over httpx (`benchmarks/polls.py`).
"""

import asyncio
import contextlib
import socket
import ssl
import weakref
from collections.abc import AsyncIterator
from functools import partial
from types import SimpleNamespace
from typing import Final

import aiohttp
import aiohttp.abc
from yarl import URL

from nanobanana_async.errors import ConfigurationError
from nanobanana_async.models import url_problem
from nanobanana_async.protocols import ExchangeError, Phase, RequestKind, WireRequest, WireResponse
from nanobanana_async.transport._connections import TlsContext
from nanobanana_async.transport._exchange import (
    CHUNK_BYTES,
    READ_TIMEOUT_S,
    BodyChunks,
    ExchangeState,
    StreamingResponse,
    cause_chain,
    is_bad_tls,
    merged_headers,
    read_response,
    run_exchange,
)
from nanobanana_async.transport.addresses import AddressCheck
from nanobanana_async.transport.proxies import Proxies, masked
from nanobanana_async.wire.addresses import parse_literal

_KEEP_ALIVE_S: Final = 120.0
"""How long an idle connection is reused, unless the server closes it first."""
_MAX_HEADER_BYTES: Final = 2**16
_AUTOMATIC_HEADERS: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_CONNECT_ERRORS: Final = (
    aiohttp.ClientConnectorError,  # names, TCP, TLS, and the connection to a proxy
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.InvalidURL,
    aiohttp.ServerFingerprintMismatch,
)


class AiohttpTransport:
    """Sends requests over aiohttp, on asyncio only, at less CPU than `HttpxTransport`.

    Args:
        session: Your own `aiohttp.ClientSession`. It sends the API calls, and you close it. Its connector chooses the
            connection of a submit: allow at least as many connections as `Limits` does, and prefer `force_close`. Its
            proxy, certificates and headers hold. It never downloads images.
        connect_s: Timeout of one connection attempt, in seconds.
        trust_env: Whether to use proxies and certificates from the environment; not used with *session*. A proxy
            resolves names itself, so configure it to refuse private addresses. Proxies that use SOCKS are refused.
        proxy: URL of a proxy for all connections of the transport, instead of those of the environment. With *session*,
            for images only.
        verify: TLS context for all connections of the transport; None trusts the usual certificates. With *session*,
            for images only.
        check_addresses: Whether to refuse image hosts at addresses that are not public. If the name of the service
            leads to 198.18.0.0/15, as with a transparent proxy, other names may, too.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession | None = None,
        *,
        connect_s: float = 10.0,
        trust_env: bool = True,
        proxy: str | None = None,
        verify: ssl.SSLContext | None = None,
        check_addresses: bool = True,
    ) -> None:
        if session is not None and not isinstance(session, aiohttp.ClientSession):
            raise ConfigurationError(f"session: expected aiohttp.ClientSession, got {type(session).__qualname__}")
        self._session = session
        self._address_check = AddressCheck(type(self).__name__) if check_addresses else None
        self._proxies = Proxies(proxy, trust_env=trust_env)
        self._tls = TlsContext(verify, trust_env=trust_env)
        self._connect_s = connect_s
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_s)
        # A timeout per read only helps where the total deadline is long and a retry is possible.
        self._download_timeout = aiohttp.ClientTimeout(sock_connect=connect_s, sock_read=READ_TIMEOUT_S)
        self._own_sessions: dict[str, aiohttp.ClientSession] = {}
        self._closed = False
        if session is not None:
            session.trace_configs.append(_phase_trace())

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """See `Transport.send`."""
        return await run_exchange(request.kind, timeout_s, partial(self._exchange, request))

    async def aclose(self) -> None:
        """Close every connection of the transport. A session that you passed stays open."""
        self._closed = True
        while self._own_sessions:
            await self._own_sessions.popitem()[1].close()

    async def _exchange(self, request: WireRequest, state: ExchangeState) -> WireResponse | ExchangeError:
        try:
            return await read_response(await self._start(request, state), request, state)
        except asyncio.CancelledError as exc:
            raise exc.with_traceback(None) from None  # frames of aiohttp have the key as a local variable
        except ExchangeError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - mapped, whatever the library raises
            return _to_exchange_error(exc, state)

    async def _start(self, request: WireRequest, state: ExchangeState) -> StreamingResponse:
        """Send *request* and return when the response head has arrived. Raises the exceptions of the library."""
        _require_asyncio()
        if problem := url_problem(request.url):
            raise _refusal(f"the URL {problem}")
        try:
            url = URL(request.url, encoded=request.url.isascii())
        except ValueError as exc:
            raise _refusal(f"not a URL: {exc}") from None
        is_lent = self._session is not None and request.kind is not RequestKind.DOWNLOAD
        proxy = None if is_lent else self._proxy(request.url)
        session = await self._session_for(request, url, is_proxied=proxy is not None)
        tls = await self._tls_context() if url.scheme == "https" and not is_lent else True
        if request.kind is not RequestKind.SUBMIT:  # the phase of a submit follows from trace events
            state.phase = Phase.SEND
        response = await session.request(
            request.method,
            url,
            headers=_headers(request),
            skip_auto_headers=_AUTOMATIC_HEADERS,
            data=_data(request.body),
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=False,
            proxy=proxy,
            ssl=tls,
            timeout=self._download_timeout if request.kind is RequestKind.DOWNLOAD else self._timeout,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            trace_request_ctx=state if request.kind is RequestKind.SUBMIT else None,
        )
        return StreamingResponse(
            response.status, merged_headers(response.raw_headers), _Chunks(response.content), partial(_close, response)
        )

    async def _session_for(self, request: WireRequest, url: URL, *, is_proxied: bool) -> aiohttp.ClientSession:
        """Return the session whose connections *request* may use."""
        check, host = self._address_check, url.raw_host or ""
        if request.kind is not RequestKind.DOWNLOAD:
            if check is not None:
                check.service_host = host
            if self._session is not None:
                if self._session.closed:
                    raise _refusal("session: expected an open session, got a closed one")
                return self._session
            return self._own_session("submit" if request.kind is RequestKind.SUBMIT else "read")
        if check is None or not request.public_only:
            return self._own_session("read")
        if parse_literal(host) is not None:
            await check.resolve(host, url.port or 443, self._connect_s)
        return self._own_session("read" if is_proxied else "checked")  # the proxy resolves

    def _own_session(self, use: str) -> aiohttp.ClientSession:
        if self._closed:
            raise _refusal("the transport is closed")
        if not self._own_sessions:
            weakref.finalize(self, _drop, self._own_sessions, asyncio.get_running_loop())
        if use not in self._own_sessions:
            is_submit, check = use == "submit", self._address_check
            connector = aiohttp.TCPConnector(
                limit=0,  # the caller bounds their number
                resolver=_CheckedResolver(check, self._connect_s) if use == "checked" and check is not None else None,
                force_close=is_submit,
                keepalive_timeout=None if is_submit else _KEEP_ALIVE_S,
            )
            self._own_sessions[use] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trace_configs=[_phase_trace()] if is_submit else [],
            )
        return self._own_sessions[use]

    async def _tls_context(self) -> ssl.SSLContext:
        try:
            return await self._tls.get()
        except OSError as exc:
            raise _refusal(f"a certificate file named in the environment cannot be used: {exc}") from None

    def _proxy(self, url: str) -> URL | None:
        proxy = self._proxies.for_url(url)
        if proxy is None:
            return None
        try:
            parsed = URL(proxy)
        except ValueError:  # its text may quote the password
            parsed = URL()
        if parsed.scheme in ("http", "https") and parsed.host:
            return parsed
        hint = (
            "Use HttpxTransport"
            if parsed.scheme.startswith("socks")
            else "Expected a URL such as http://127.0.0.1:3128"
        )
        raise _refusal(f"the proxy {masked(proxy)} cannot be used. {hint}")


class _Chunks:
    """The body of a response as it arrives.

    `StreamReader` raises a failure before it returns what came before it. The bytes are returned first here, because
    they may hold a task id.
    """

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._content.readany()
        except Exception:
            buffer = self._content._buffer  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - nothing public returns it after a failure
            chunk = b"".join(buffer)
            buffer.clear()
            if not chunk:
                raise
        if chunk:
            return chunk
        raise StopAsyncIteration


class _CheckedResolver(aiohttp.abc.AbstractResolver):
    """Resolves names to addresses that were checked, so that a name cannot lead elsewhere after its check."""

    def __init__(self, check: AddressCheck, timeout_s: float) -> None:
        self._check = check
        self._timeout_s = timeout_s

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - both are used
    ) -> list[aiohttp.abc.ResolveResult]:
        """Return the addresses of *host*, of both families. Raises ExchangeError unless all of them are public."""
        return [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._check.resolve(host, port, self._timeout_s)
        ]

    async def close(self) -> None:
        """Do nothing."""


def _phase_trace() -> aiohttp.TraceConfig:
    """Return a trace that sets the phase of a submit, once a connection can carry it.

    aiohttp reports a connection as created after the handshakes with proxy and peer.
    """

    async def connected(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
        if isinstance(context.trace_request_ctx, ExchangeState):  # the user's session sends other requests, too
            context.trace_request_ctx.phase = Phase.SEND

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(connected)
    trace.on_connection_reuseconn.append(connected)
    trace.freeze()
    return trace


def _headers(request: WireRequest) -> dict[str, str]:
    # A function of its own, so that no frame of a suspended exchange has the headers as a local variable.
    length = {} if request.body is None else {"Content-Length": str(len(request.body))}
    return {**request.headers, **length}


def _data(body: bytes | None) -> bytes | BodyChunks | None:
    return body if body is None or len(body) <= CHUNK_BYTES else BodyChunks(body)


def _close(response: aiohttp.ClientResponse) -> None:
    """Return the connection to its pool if the body was read to its end, else close it."""
    if response.content.at_eof():
        response.release()
    else:
        response.close()


def _drop(sessions: dict[str, aiohttp.ClientSession], loop: asyncio.AbstractEventLoop) -> None:
    """Close the sessions of a transport that was dropped without closing it, from any thread."""
    try:
        loop.call_soon_threadsafe(_close_now, sessions)
    except RuntimeError:  # the event loop has ended
        _close_now(sessions)


def _close_now(sessions: dict[str, aiohttp.ClientSession]) -> None:
    for session in sessions.values():
        closing = session.close()  # all it waits for is the farewell of TLS
        with contextlib.suppress(StopIteration):
            closing.send(None)
        closing.close()


def _require_asyncio() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise _refusal("AiohttpTransport runs on asyncio only. Use HttpxTransport") from None


def _refusal(reason: str) -> ExchangeError:
    return ExchangeError(reason, phase=Phase.CONNECT, permanent=True)


def _to_exchange_error(exc: Exception, state: ExchangeState) -> ExchangeError:
    """Return the package's error for an exception of aiohttp. Its text is kept, the exception is not."""
    if isinstance(exc, aiohttp.ClientResponseError):  # its text quotes the URL of a proxy, with the password
        detail = f"{exc.status} {exc.message}"
    else:
        detail = str(list(cause_chain(exc))[-1]) or str(exc)
    reason = f"{type(exc).__name__}: {detail}".removesuffix(": ")
    if not isinstance(exc, _CONNECT_ERRORS):
        return state.to_error(reason)
    is_denied = isinstance(exc, aiohttp.ClientHttpProxyError) and exc.status == 407
    permanent = is_denied or is_bad_tls(exc) or isinstance(exc, aiohttp.InvalidURL)
    return state.to_error(reason, phase=Phase.CONNECT, permanent=permanent)
