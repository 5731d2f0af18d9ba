"""One exchange of any transport: its deadline, its phase, and a body that is read raw, within limits."""

import ssl
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

import anyio
import anyio.lowlevel
import attrs

from nanobanana_async._concurrency.timeouts import run_within
from nanobanana_async.protocols import ExchangeError, Phase, RequestKind, WireRequest, WireResponse

READ_TIMEOUT_S: Final = 30.0
"""How long a file host may send nothing before a retry helps."""
CHUNK_BYTES: Final = 2**18
"""How much of a request body is handed to a library at a time."""
_CLOSE_TIMEOUT_S: Final = 2.0
"""Bound on closing one connection, which a TLS peer may delay."""
_MIN_BYTES_PER_S: Final = 1024
"""Least rate of a download. A slower one holds a slot that others need."""
_RATE_WINDOW_S: Final = 10.0
"""How long the rate is measured."""
_GROWTH_BYTES: Final = 2**20
_MAX_ERROR_BODY_BYTES: Final = 2**20
"""Largest body of a response other than a 200."""
_YIELD_AFTER_CHUNKS: Final = 256
"""Number of chunks after which other tasks run. A peer may send thousands of chunks of one byte."""


@attrs.define
class ExchangeState:
    """The state of one exchange, kept to classify a failure."""

    phase: Phase = Phase.CONNECT
    head: "StreamingResponse | None" = None
    """Set once the head of a response has arrived."""
    received: bytearray = attrs.field(factory=bytearray)

    def to_error(self, reason: str, *, phase: Phase | None = None, permanent: bool = False) -> ExchangeError:
        """Return the error of an exchange that has come this far, with what was received."""
        response = None
        if self.head is not None:
            response = WireResponse(status=self.head.status, headers=self.head.headers, body=bytes(self.received))
        phase = self.phase if phase is None else phase
        return ExchangeError(reason, phase=phase, permanent=permanent, response=response)


@attrs.frozen
class StreamingResponse:
    """A response whose head has arrived. `chunks` is the body as received, never decompressed."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterable[bytes]
    _close: Callable[[], Awaitable[None] | None]

    async def aclose(self) -> None:
        """Release the connection: it becomes idle if the body was read to its end, else it is closed.

        Bounded in time, also if cancelled.
        """
        if (closing := self._close()) is not None:
            with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                await closing


class BodyChunks:
    """A request body in chunks, so that a body of megabytes is not copied as a whole by each layer below.

    An async generator would remain unfinished if writing fails, and trio warns about that.
    """

    def __init__(self, data: bytes) -> None:
        self._chunks = (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


def merged_headers(raw_headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by name in lower case; the values of a repeated one are joined with commas (RFC 9110, 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw_headers:
        name, value = raw_name.decode("ascii").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def cause_chain(exc: BaseException) -> Iterator[BaseException]:
    """Yield *exc* and what caused it, as far as these are errors: a cancellation is not useful to the reader."""
    seen: BaseException | None = exc
    while isinstance(seen, Exception):
        yield seen
        seen = seen.__cause__ or seen.__context__


def is_bad_tls(exc: BaseException) -> bool:
    """Return whether *exc* is about a certificate, or a peer that does not use TLS. A retry cannot help."""
    return any(
        isinstance(cause, ssl.SSLCertVerificationError) or getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER"
        for cause in cause_chain(exc)
    )


async def run_exchange(
    kind: RequestKind, timeout_s: float, exchange: Callable[[ExchangeState], Awaitable[WireResponse | ExchangeError]]
) -> WireResponse:
    """Return what *exchange*, which must not raise, returns within *timeout_s*.

    Raises:
        ExchangeError: The one that it returned, or that the time is up.
    """
    state = ExchangeState()
    outcome: WireResponse | ExchangeError | None = None

    async def work() -> None:
        nonlocal outcome
        outcome = await exchange(state)

    if kind is RequestKind.SUBMIT:  # its response may have arrived while the process was stopped
        await run_within(timeout_s, work)
    else:
        with anyio.move_on_after(timeout_s):
            await work()
    if isinstance(outcome, WireResponse):
        return outcome
    # Raised outside every except block: an exception in `__context__` would hold the request with the key.
    raise outcome or state.to_error(f"no complete response within {timeout_s:.3g} s")


async def read_response(streaming: StreamingResponse, request: WireRequest, state: ExchangeState) -> WireResponse:
    """Read the body within the limits of *request*, and release the connection. What has arrived is in *state*."""
    state.phase, state.head = Phase.RESPONSE, streaming
    try:
        cap = request.max_bytes if streaming.status == 200 else min(request.max_bytes, _MAX_ERROR_BODY_BYTES)
        on_growth = None
        if request.before_body is not None and streaming.status == 200:
            head = WireResponse(status=200, headers=streaming.headers)
            await request.before_body(head)
            if "content-length" not in streaming.headers:
                unstated = {**streaming.headers, "content-length": str(request.max_bytes)}
                on_growth = partial(request.before_body, attrs.evolve(head, headers=unstated))
        min_bytes_per_s = _MIN_BYTES_PER_S if request.kind is RequestKind.DOWNLOAD else 0
        await _read_body(streaming, cap, state, _BodyWatch(min_bytes_per_s, on_growth))
    finally:
        await streaming.aclose()
    return WireResponse(status=streaming.status, headers=streaming.headers, body=bytes(state.received))


@attrs.define
class _BodyWatch:
    """What is checked while a body arrives: its rate, in windows of ten seconds, and memory if it states no length."""

    min_bytes_per_s: int
    """0 for a body whose rate does not matter."""
    on_growth: Callable[[], Awaitable[None]] | None
    """Awaited once a MiB has arrived."""
    since_s: float = attrs.field(factory=anyio.current_time)
    since_bytes: int = 0

    async def problem(self, received_bytes: int) -> str | None:
        """Return why the body is not read any further; None if it is."""
        if self.on_growth is not None and received_bytes > _GROWTH_BYTES:
            await self.on_growth()
            self.on_growth, self.since_s = None, anyio.current_time()
        if not self.min_bytes_per_s:
            return None
        took_s = anyio.current_time() - self.since_s
        if took_s < _RATE_WINDOW_S:
            return None
        is_slow = received_bytes - self.since_bytes < self.min_bytes_per_s * took_s
        self.since_s, self.since_bytes = self.since_s + took_s, received_bytes
        return f"the body arrives at less than {self.min_bytes_per_s} bytes per second" if is_slow else None


async def _read_body(streaming: StreamingResponse, max_bytes: int, state: ExchangeState, watch: _BodyWatch) -> None:
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
            state.received += chunk[:left]
            left -= len(chunk)
            if (problem := await watch.problem(len(state.received))) is not None:
                stopped = state.to_error(problem)
            if left < 0:
                stopped = state.to_error("the body exceeds the limit", permanent=True)
            if stopped is not None:
                await streaming.aclose()
    except Exception:  # reading after the close fails differently on each backend
        if stopped is None:
            raise
    if stopped is not None:
        raise stopped
