"""The seam between what we say and how it travels: one request out, one reply back."""

import enum
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeAlias

import attrs
from attrs.validators import instance_of

ChunkSink: TypeAlias = Callable[[bytes], Awaitable[None]]
"""Takes the next piece of a body that is streamed rather than kept."""


class RequestKind(enum.Enum):
    """What a request is for, which decides how it may travel."""

    SUBMIT = enum.auto()
    """Costs money. A fresh connection: on a reused one, 20 of 4800 failed ambiguously (measured)."""
    READ = enum.auto()
    """An API call that is safe to repeat. Reuses connections."""
    DOWNLOAD = enum.auto()
    """A file on somebody else's host: never with credentials, cookies or a handed-in client."""


class Phase(enum.IntEnum):
    """How far an exchange got before it failed. Up to `CONNECT`, the peer provably had no byte of the request."""

    CONNECT = 0
    SEND = 1
    """The request was on its way: it may have arrived whole, in part or not at all."""
    RESPONSE = 2
    """At least the status line of a reply had arrived."""


@attrs.frozen(kw_only=True)
class WireRequest:
    """One HTTP request, ready to go."""

    kind: RequestKind
    method: str
    url: str
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    body: bytes | None = attrs.field(default=None, repr=False)
    max_bytes: int = 2**20
    """Largest reply body that is read; one that is longer ends the exchange."""
    public_only: bool = False
    """Refuse to connect to an address that is not public."""


def _check_headers(_: object, __: object, headers: Mapping[object, object]) -> None:
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"headers: expected texts, got {name!r:.80}: {value!r:.80}")


@attrs.frozen(kw_only=True)
class WireResponse:
    """One HTTP reply. Header names are lower case; `body` is as it came, never decompressed."""

    status: int = attrs.field(validator=instance_of(int))
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False, validator=_check_headers)
    body: bytes = attrs.field(default=b"", repr=False, validator=instance_of(bytes))


class ExchangeError(Exception):
    """No whole reply came. Raised by transports, never seen by users; holds text and bytes only, so no key.

    Attributes:
        phase: How far it got; the verdict on a submit hangs on it.
        permanent: Trying again cannot help (a certificate, a malformed URL, a refused address).
        reply: What had arrived of the reply, cut where it failed; None before the status line.
    """

    def __init__(
        self, reason: str, *, phase: Phase, permanent: bool = False, response: WireResponse | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.phase, self.permanent, self.response = reason, phase, permanent, response


class Transport(Protocol):
    """One request out, one reply back. Never retries, never follows redirects, never keeps anybody waiting in a queue.

    Callers bound how many requests are under way; an implementation must be able to carry all they send.
    """

    async def send(self, request: WireRequest, *, timeout_s: float, sink: ChunkSink | None = None) -> WireResponse:
        """Return the reply to *request* within *timeout_s* seconds in all.

        With a *sink*, the body of a 200 goes there piece by piece and the reply's own `body` is empty.
        Cancelling gives up the connection, and nothing else.

        Raises:
            ExchangeError: No whole reply came in time, or its body was longer than `request.max_bytes`.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection. Twice is harmless."""
        ...
