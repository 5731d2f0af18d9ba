"""Connections that carry one exchange at a time. With `transport.httpx` the only file that names httpx.

The package's own connections are single httpcore connections. A pool around each, and the request and response objects
of httpx, cost a third of the CPU of a small exchange (`benchmarks/polls.py`). Proxies, and a client that the user
passes, go through httpx.
"""

import ssl
import sys
from collections.abc import AsyncIterable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import anyio.to_thread
import attrs
import httpx

from nanobanana_async.errors import ConfigurationError
from nanobanana_async.models import url_problem
from nanobanana_async.protocols import WireRequest
from nanobanana_async.transport._exchange import BodyChunks, StreamingResponse, merged_headers

if TYPE_CHECKING:
    import httpcore
    import httpx2

_CLOSE_TIMEOUT_S: Final = 2.0
"""Bound on closing one connection, which a TLS peer may delay."""
_KEEP_ALIVE_S: Final = 120.0
"""How long an idle connection is reused, unless the server closes it first."""
_SINGLE_CONNECTION: Final = httpx.Limits(max_connections=1, max_keepalive_connections=1)


@attrs.frozen
class Destination:
    """Where to connect for one request."""

    url: httpx.URL
    headers: Mapping[str, str] = attrs.field(repr=False)
    addresses: tuple[str, ...] = ()
    """Addresses of the host that were checked; () leaves them to the library."""


class Connection(Protocol):
    """A connection that carries one exchange at a time."""

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """Send *request* and return when the response head has arrived. Raises the exceptions of the library."""
        ...

    @property
    def is_reusable(self) -> bool:
        """Whether it can carry another exchange."""
        ...

    @property
    def is_own(self) -> bool:
        """Whether it is a connection of this transport, and not a client of the user's."""
        ...

    async def aclose(self) -> None:
        """Close the connection."""
        ...


class _RequestBody(BodyChunks, httpx.AsyncByteStream):
    """A body as httpx takes it."""


def _headers(request: WireRequest, target: Destination) -> dict[str, str]:
    headers = {"Host": target.url.netloc.decode("ascii"), **target.headers}
    if request.body is not None:
        headers["Content-Length"] = str(len(request.body))
    return headers


async def import_httpcore() -> None:
    """Import httpcore in a thread. The import takes 0.1 s, most of it for trio, and would block the event loop."""
    if "httpcore" not in sys.modules:
        await anyio.to_thread.run_sync(import_module, "httpcore")


def _core_url(url: httpx.URL) -> "httpcore.URL":
    import httpcore  # noqa: PLC0415 - see `import_httpcore`

    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _core_request(request: WireRequest, target: Destination, extensions: dict[str, object]) -> "httpcore.Request":
    # A function of its own, so that no frame of a suspended exchange has the headers as a local variable.
    import httpcore  # noqa: PLC0415 - see `import_httpcore`

    headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in _headers(request, target).items()]
    return httpcore.Request(
        request.method,
        _core_url(target.url),
        headers=headers,
        content=_RequestBody(request.body or b""),
        extensions=extensions,
    )


class DirectConnection:
    """A direct httpcore connection. Call `import_httpcore` first."""

    is_own = True

    def __init__(self, target: Destination, tls: ssl.SSLContext) -> None:
        import httpcore  # noqa: PLC0415 - see `import_httpcore`

        from nanobanana_async.transport._dialing import PinnedBackend  # noqa: PLC0415 - it imports httpcore

        self._connection = httpcore.AsyncHTTPConnection(
            _core_url(target.url).origin,
            ssl_context=tls,
            keepalive_expiry=_KEEP_ALIVE_S,
            network_backend=PinnedBackend(target.addresses) if target.addresses else None,
        )

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """See `Connection.send`."""
        response = await self._connection.handle_async_request(_core_request(request, target, extensions))
        assert isinstance(response.stream, AsyncIterable)  # noqa: S101 - always true for an async connection
        headers = merged_headers(response.headers)
        return StreamingResponse(response.status, headers, response.stream, response.aclose)

    @property
    def is_reusable(self) -> bool:
        """See `Connection.is_reusable`."""
        return self._connection.is_idle() and not self._connection.has_expired()

    async def aclose(self) -> None:
        """See `Connection.aclose`."""
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await self._connection.aclose()


class ProxyConnection:
    """A connection through a proxy.

    Raises:
        ImportError: The proxy uses SOCKS, and the package for it is not installed.
        ValueError: The URL is not that of a proxy.
    """

    is_own = True
    is_reusable = True
    """httpx decides about reuse."""

    def __init__(self, proxy: str, tls: ssl.SSLContext) -> None:
        self._transport = httpx.AsyncHTTPTransport(verify=tls, limits=_SINGLE_CONNECTION, proxy=proxy)

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """See `Connection.send`."""
        response = await self._transport.handle_async_request(_to_httpx_request(request, target, extensions))
        return _from_httpx_response(response)

    async def aclose(self) -> None:
        """See `Connection.aclose`."""
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await self._transport.aclose()


def _to_httpx_request(request: WireRequest, target: Destination, extensions: dict[str, object]) -> httpx.Request:
    stream = _RequestBody(request.body or b"")
    return httpx.Request(
        request.method, target.url, headers=_headers(request, target), stream=stream, extensions=extensions
    )


def _from_httpx_response(response: "httpx.Response | httpx2.Response") -> StreamingResponse:
    headers = dict(response.headers.items())
    if response.is_stream_consumed:  # an event hook read it, or it was not a stream: httpx has decoded it
        headers.pop("content-encoding", None)
        headers["content-length"] = str(len(response.content))
        return StreamingResponse(response.status_code, headers, _RequestBody(response.content), response.aclose)
    return StreamingResponse(response.status_code, headers, response.aiter_raw(), response.aclose)


@attrs.frozen
class ClientConnection:
    """The user's client, of httpx or httpx2. Both have the methods used here."""

    client: "httpx.AsyncClient | httpx2.AsyncClient"
    is_reusable = True
    is_own = False

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """See `Connection.send`."""
        built = self.client.build_request(
            request.method, str(target.url), headers=target.headers, content=request.body, extensions=extensions
        )
        return _from_httpx_response(await self.client.send(built, stream=True, auth=None, follow_redirects=False))  # type: ignore[arg-type]

    async def aclose(self) -> None:
        """Do nothing. The user closes the client."""


class TlsContext:
    """The TLS context of a transport: *verify*, else one that trusts the usual certificates, created once."""

    def __init__(self, verify: ssl.SSLContext | None, *, trust_env: bool) -> None:
        self._context = verify
        self._trust_env = trust_env
        self._lock = anyio.Lock()

    async def get(self) -> ssl.SSLContext:
        """Return the context, which is created in a thread: loading the certificates takes 20-50 ms.

        Raises:
            OSError: A certificate file that is named in the environment cannot be used.
        """
        async with self._lock:
            if self._context is None:
                self._context = await anyio.to_thread.run_sync(
                    lambda: httpx.create_ssl_context(trust_env=self._trust_env)
                )
        return self._context


@lru_cache(2048)  # a task is polled several times, and parsing costs a tenth of a request
def parse_url(text: str) -> httpx.URL | str:
    """Return the parsed URL, or what is wrong with it."""
    if problem := url_problem(text):
        return f"the URL {problem}"
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as exc:
        return f"not a URL: {exc}"


def check_client(client: object) -> None:
    """Raise TypeError unless *client* is an AsyncClient. A sync client would fail only at the first request."""
    if client is not None and not any(
        base.__name__ == "AsyncClient" and base.__module__.partition(".")[0] in ("httpx", "httpx2")
        for base in type(client).__mro__
    ):
        found = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ConfigurationError(f"client: expected httpx.AsyncClient or httpx2.AsyncClient, got {found}")
