"""Lanes: what one exchange travels on. With `http`, the only files that name httpx.

Ours are single connections of httpcore, the engine inside httpx: a pool around each, and httpx's request and response
objects around that, cost a third of the CPU of a small exchange (`benchmarks/polls.py`). Proxies are httpx's business,
and so is a client that was handed in.
"""

import ssl
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

import anyio
import anyio.to_thread
import attrs
import httpx

from nanobanana_async.errors import ConfigurationError
from nanobanana_async.protocols import WireRequest

if TYPE_CHECKING:
    import httpcore
    import httpx2

_CLOSE_TIMEOUT_S: Final = 2.0
"""Bound on closing one connection, which TLS peers may drag out."""
_KEEP_ALIVE_S: Final = 5.0
"""How long a connection at rest is trusted; httpx's own default."""
_SINGLE_CONNECTION: Final = httpx.Limits(max_connections=1, max_keepalive_connections=1)


@attrs.frozen
class Destination:
    """Where to connect for one request: with a pinned address, the name lives on in `Host` and in SNI."""

    url: httpx.URL
    headers: Mapping[str, str] = attrs.field(repr=False)
    extensions: Mapping[str, object]


@attrs.frozen
class StreamingResponse:
    """A reply whose head has arrived. `pieces` is the body as it comes, never decompressed."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterable[bytes]
    _close: Callable[[], Awaitable[None]]

    async def aclose(self) -> None:
        """Be done with it: the connection is at rest if the body was read to its end, and else is given up.

        Bounded, also when cancelled.
        """
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await self._close()


class Connection(Protocol):
    """What one exchange travels on."""

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """Send *request* and return when the head of the reply is there. Raises the library's own exceptions."""
        ...

    @property
    def is_reusable(self) -> bool:
        """Whether it can carry another exchange."""
        ...

    async def aclose(self) -> None:
        """Hang up."""
        ...


class _RequestBody(httpx.AsyncByteStream):
    """A request body in one piece.

    The libraries' own are async generators, left unfinished when writing fails, and trio complains about those.
    """

    def __init__(self, data: bytes | None) -> None:
        self._pieces = iter([data] if data else [])

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self._pieces:
            return chunk
        raise StopAsyncIteration


def _headers(request: WireRequest, target: Destination) -> dict[str, str]:
    headers = {"Host": target.url.netloc.decode("ascii"), **target.headers}
    if request.body is not None:
        headers["Content-Length"] = str(len(request.body))
    return headers


async def import_httpcore() -> None:
    """Import httpcore off the loop. It takes a tenth of a second, most of it trio's, so nobody does it in passing."""
    if "httpcore" not in sys.modules:
        await anyio.to_thread.run_sync(import_module, "httpcore")


def _core_url(url: httpx.URL) -> "httpcore.URL":
    import httpcore  # noqa: PLC0415 - see `load_engine`

    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _core_request(request: WireRequest, target: Destination, extensions: dict[str, object]) -> "httpcore.Request":
    # Built in a call of its own, so that no frame of a suspended exchange has the headers among its variables.
    import httpcore  # noqa: PLC0415 - the same

    headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in _headers(request, target).items()]
    return httpcore.Request(
        request.method,
        _core_url(target.url),
        headers=headers,
        content=_RequestBody(request.body),
        extensions=extensions,
    )


class DirectConnection:
    """One connection of ours. Only after `load_engine`."""

    def __init__(self, url: httpx.URL, tls: ssl.SSLContext) -> None:
        import httpcore  # noqa: PLC0415 - the same

        submit_info = _core_url(url).origin
        self._connection = httpcore.AsyncHTTPConnection(submit_info, ssl_context=tls, keepalive_expiry=_KEEP_ALIVE_S)

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """See `Connection.send`."""
        response = await self._connection.handle_async_request(_core_request(request, target, extensions))
        headers: dict[str, str] = {}
        for raw_name, raw_value in response.headers:
            name, value = raw_name.decode("ascii").lower(), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        assert isinstance(response.stream, AsyncIterable)  # noqa: S101 - what an async connection answers with
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
    """One connection of ours through a proxy.

    Raises:
        ImportError: It speaks SOCKS, and that needs a package that is not there.
        ValueError: It is not a proxy's URL.
    """

    is_reusable = True
    """httpx sees to it."""

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
    stream = _RequestBody(request.body)
    return httpx.Request(
        request.method, target.url, headers=_headers(request, target), stream=stream, extensions=extensions
    )


def _from_httpx_response(response: "httpx.Response | httpx2.Response") -> StreamingResponse:
    headers = dict(response.headers.items())
    if response.is_stream_consumed:  # by an event hook, or it never was a stream: httpx has read and decoded it
        headers.pop("content-encoding", None)
        headers["content-length"] = str(len(response.content))
        return StreamingResponse(response.status_code, headers, _RequestBody(response.content), response.aclose)
    return StreamingResponse(response.status_code, headers, response.aiter_raw(), response.aclose)


@attrs.frozen
class ClientConnection:
    """The user's client, httpx's or httpx2's: what we call is the same on both."""

    client: "httpx.AsyncClient | httpx2.AsyncClient"
    is_reusable = True

    async def send(self, request: WireRequest, target: Destination, extensions: dict[str, object]) -> StreamingResponse:
        """See `Connection.send`."""
        built = self.client.build_request(
            request.method, str(target.url), headers=target.headers, content=request.body, extensions=extensions
        )
        return _from_httpx_response(await self.client.send(built, stream=True, auth=None, follow_redirects=False))  # type: ignore[arg-type]

    async def aclose(self) -> None:
        """Do nothing: it is not ours."""


def check_client(client: object) -> None:
    """Refuse what is neither library's AsyncClient; a sync client would fail only at the first request."""
    if client is not None and not any(
        base.__name__ == "AsyncClient" and base.__module__.partition(".")[0] in ("httpx", "httpx2")
        for base in type(client).__mro__
    ):
        found = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ConfigurationError(f"client: expected httpx.AsyncClient or httpx2.AsyncClient, got {found}")
