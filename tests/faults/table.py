"""The faults F1 to F21 as data: the behaviour of the peer, and the expected result."""

import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

import attrs


class Peer(Protocol):
    """The server's end of one connection, after it has read a complete request."""

    good: bytes
    """The body that would be right."""

    async def send(self, data: bytes) -> None:
        """Send *data*."""
        ...

    async def drip(self, data: bytes) -> None:
        """Send *data*, one byte every 50 ms."""
        ...

    async def flood(self, head: bytes, chunk: bytes) -> None:
        """Send *head*, and then *chunk* repeatedly, up to a gibibyte."""
        ...

    async def hang(self) -> None:
        """Send nothing more, for longer than any deadline here."""
        ...

    def reset(self) -> None:
        """Close with RST."""
        ...


Play: TypeAlias = Callable[[Peer], Awaitable[None]]


@attrs.frozen(eq=False)
class Fault:
    """One way for an exchange to fail."""

    number: str
    name: str
    play: Play
    post: str
    """Expected result of a submit: accepted, rejected, not sent or unknown; one of two where timing decides."""
    get: str = "recovers"
    """Expected result of a query: "recovers" after the fault ends, "refused" by an error response, or "fails"."""
    charges: bool = True
    """Whether the submit is charged before the fault."""
    listener: str = "main"
    """The port that plays it. A fault before a request is read has its own."""


def message(body: bytes, *, status: str = "200 OK", length: int | None = None, head: str = "") -> bytes:
    """Return an HTTP/1.1 message with a Content-Length."""
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{head}\r\n".encode() + body


UNFRAMED: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
NO_ID: Final = b'{"code":0,"message":"ok","data":{"ta'


def says(body: bytes, *, status: str = "200 OK", head: str = "") -> Play:
    """Respond with this message."""

    async def play(peer: Peer) -> None:
        await peer.send(message(body, status=status, head=head))

    return play


def envelope(status: str, code: object, detail: object = "no", head: str = "") -> Play:
    """Respond with the service's own error."""
    return says(json.dumps({"code": code, "message": "failed", "detail": detail}).encode(), status=status, head=head)


def wrapped(change: Callable[[bytes], bytes], head: str = "") -> Play:
    """Respond correctly, in an unusual encoding."""

    async def play(peer: Peer) -> None:
        await peer.send(message(change(peer.good), head=head))

    return play


def broken(*chunks: bytes, end: str = "fin") -> Play:
    """Send *chunks*, and end the connection by FIN, RST or silence."""

    async def play(peer: Peer) -> None:
        for chunk in chunks:
            await peer.send(chunk)
        if end == "hang":
            await peer.hang()
        elif end == "rst":
            peer.reset()

    return play


def cut(*, with_id: bool, end: str) -> Play:
    """Break off in the body, after or before the task id."""

    async def play(peer: Peer) -> None:
        body = peer.good[:-2] if with_id else NO_ID
        await broken(message(body, length=1000), end=end)(peer)

    return play


def unframed(*, with_id: bool) -> Play:
    """Truncate the JSON where no Content-Length shows it."""

    async def play(peer: Peer) -> None:
        await peer.send(UNFRAMED + (peer.good[:-2] if with_id else NO_ID))

    return play


async def never(_: Peer) -> None:
    """Stand for a fault that happens before a request is read."""


async def slow_headers(peer: Peer) -> None:
    """Drip the headers."""
    await peer.drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 200)


async def slow_body(peer: Peer) -> None:
    """Drip the body."""
    await peer.send(message(b"", length=1000))
    await peer.drip(NO_ID + b" " * 200)


async def slow_body_with_id(peer: Peer) -> None:
    """Send the id at once, and drip the rest."""
    await peer.send(message(peer.good[:-2], length=1000))
    await peer.drip(b" " * 200)


async def endless(peer: Peer) -> None:
    """Send without end."""
    chunk = b"x" * 65536
    await peer.flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + chunk + b"\r\n")


async def gibibyte(peer: Peer) -> None:
    """Announce and send a gibibyte."""
    await peer.flood(message(b"", length=2**30), b"x" * 65536)


def after_head(value: str) -> str:
    """Return a Retry-After header."""
    return f"Retry-After: {value}\r\n"


GZIPPED: Final = "Content-Encoding: gzip\r\n"
BOMB: Final = gzip.compress(bytes(32 * 2**20))
HTML: Final = b"<html><head><title>Bad gateway</title></head></html>"
MOVED: Final = says(b"", status="307 Moved", head="Location: http://127.0.0.1:9/x\r\n")
RETRY_AFTERS: Final = {
    **dict.fromkeys(("0", "1", "Wed, 21 Oct 2015 07:28:00 GMT", "-1", "nan", "1, 2", "soon"), "recovers"),
    "1000000000": "refused",  # five minutes exceed the time left
}

FAULTS: Final = (
    Fault("F1", "connection refused", never, "not sent", "fails", charges=False, listener="closed"),
    Fault("F2", "SYN lost", never, "not sent", "fails", charges=False, listener="full"),
    Fault("F4", "FIN before reading", never, "unknown", "fails", charges=False, listener="fin"),
    Fault("F4", "RST before reading", never, "not sent or unknown", "fails", charges=False, listener="rst"),
    Fault("F4", "silence before reading", never, "unknown", "fails", charges=False, listener="hang"),
    *(Fault("F5", f"read, then {end}", broken(end=end), "unknown") for end in ("fin", "rst", "hang")),
    *(
        Fault("F6", f"{end} in the headers", broken(b"HTTP/1.1 200 OK\r\nContent-", end=end), "unknown")
        for end in ("fin", "rst", "hang")
    ),
    *(Fault("F7", f"{end} behind the id", cut(with_id=True, end=end), "accepted") for end in ("fin", "rst", "hang")),
    *(Fault("F7", f"{end} before the id", cut(with_id=False, end=end), "unknown") for end in ("fin", "rst", "hang")),
    Fault("F8", "unframed JSON cut behind the id", unframed(with_id=True), "accepted"),
    Fault("F8", "unframed JSON cut before the id", unframed(with_id=False), "unknown"),
    Fault("F9", "slow headers", slow_headers, "unknown"),
    Fault("F9", "slow body", slow_body, "unknown"),
    Fault("F9", "slow body behind the id", slow_body_with_id, "accepted"),
    Fault("F12", "100-continue, then FIN", broken(b"HTTP/1.1 100 Continue\r\n\r\n"), "unknown"),
    Fault("F12", "two lengths", broken(message(b"{}", head="Content-Length: 7\r\n")), "unknown"),
    Fault("F12", "300 kB header", broken(message(b"{}", head=f"X-Big: {'x' * 300_000}\r\n")), "unknown"),
    Fault("F12", "garbage", broken(b"\0\1\2 what is this\r\n\r\n"), "unknown"),
    *(
        Fault("F13", f"HTML {status}", says(HTML, status=f"{status} Bad"), "unknown")
        for status in (500, 502, 503, 504, 520, 522, 527)
    ),
    Fault("F13", "503 with Retry-After", says(HTML, status="503 Busy", head="Retry-After: 0\r\n"), "unknown"),
    Fault("F14", "JSON as text/html", wrapped(bytes, "Content-Type: text/html\r\n"), "accepted"),
    Fault("F14", "JSON without a type", wrapped(bytes), "accepted"),
    *(
        Fault("F15", f"200 with code {code!r}", envelope("200 OK", code), "rejected", "refused", charges=False)
        for code in (False, True, None, 0.0, 1, "1")
    ),
    Fault("F15", "code 0, no data", says(b'{"code":0,"message":"ok"}'), "unknown"),
    *(
        Fault("F16", f"400, detail {detail!r}", envelope("400 Bad", 1, detail), "rejected", "refused", charges=False)
        for detail in ("prompt is required", None, ["a", 1], {"a": 1})
    ),
    Fault("F17", "401, code 1", envelope("401 No", 1), "rejected", "refused", charges=False),
    Fault("F17", "401, code 401", envelope("401 No", 401), "rejected", "refused", charges=False),
    Fault("F17", "200, code 401", envelope("200 OK", 401), "rejected", "refused", charges=False),
    Fault("F17", "401 as HTML", says(HTML, status="401 No"), "rejected", "refused", charges=False),
    *(
        Fault("F18", f"429, {after}", envelope("429 Slow", 1, head=after_head(after)), "rejected", get, charges=False)
        for after, get in RETRY_AFTERS.items()
    ),
    Fault("F18", "429, no header", envelope("429 Slow", 1), "rejected", charges=False),
    Fault("F19", "endless body", endless, "unknown"),
    Fault("F19", "a gibibyte", gibibyte, "unknown"),
    Fault("F20", "gzip", wrapped(gzip.compress, GZIPPED), "accepted"),
    Fault("F20", "deflate", wrapped(zlib.compress, "Content-Encoding: deflate\r\n"), "accepted"),
    Fault("F20", "gzip bomb", says(BOMB, head=GZIPPED), "unknown"),
    Fault(
        "F20", "triple bomb", says(gzip.compress(gzip.compress(BOMB)), head=GZIPPED), "unknown"
    ),
    Fault("F20", "bomb on a 502", says(BOMB, status="502 Bad", head=GZIPPED), "unknown"),
    Fault("F20", "br in name only", wrapped(bytes, "Content-Encoding: br\r\n"), "accepted"),
    Fault("F21", "200,000 brackets", says(b"[" * 200_000), "unknown"),
    Fault("F21", "5,000 digits", says(b'{"code":' + b"0" * 5000 + b"}"), "unknown"),
    Fault("F21", "NaN", says(b'{"code":NaN,"data":{}}'), "unknown"),
    Fault("F21", "lone surrogate as id", says(b'{"code":0,"data":{"task_id":"\\ud800"}}'), "accepted"),
    Fault("F21", "BOM", wrapped(lambda good: b"\xef\xbb\xbf" + good), "accepted"),
    Fault("F21", "UTF-16", wrapped(lambda good: good.decode().encode("utf-16")), "accepted"),
    Fault("F21", "bad UTF-8", wrapped(lambda good: good.replace(b"ok", b"\xff\xfe")), "accepted"),
    Fault("F21", "duplicate keys", wrapped(lambda good: b'{"code":1,' + good[1:]), "accepted"),
    Fault("-", "408 after the charge", says(HTML, status="408 Late"), "unknown"),
    Fault("-", "408 with the service's JSON", envelope("408 Late", 1), "unknown"),
    Fault("-", "firewall's 403 page", says(HTML, status="403 No"), "rejected", "refused", charges=False),
    Fault("-", "service's own 500, charged", envelope("500 Oops", 1), "unknown"),
    Fault("-", "service's own 500, not charged", envelope("500 Oops", 1), "unknown", charges=False),
    Fault("-", "redirect", MOVED, "rejected", "refused", charges=False),
)  # fmt: skip
