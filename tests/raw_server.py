"""A raw-socket server for tests that sends exactly the given bytes and records what it received."""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from nanobanana_async import RequestKind, WireRequest

Handler: TypeAlias = Callable[[socket.socket, bytes], None]


class RawServer:
    """One thread per connection. *handle* gets the socket and the request."""

    def __init__(self, handle: Handler, *, reads: bool, tls: ssl.SSLContext | None) -> None:
        self._handle = handle
        self._reads = reads
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: Final[int] = self._listener.getsockname()[1]
        self.url: Final = f"http://127.0.0.1:{self.port}"
        self.requests: list[bytes] = []
        self.connections = 0
        self.open_connections = 0
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def accept_forever(self) -> None:
        """Serve until closed."""
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(peer,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, peer: socket.socket) -> None:
        peer.settimeout(5)
        self.open_connections += 1
        with contextlib.suppress(OSError), peer:
            if self._tls is None:
                self._talk(peer)
            else:
                with self._tls.wrap_socket(peer, server_side=True) as secure:
                    self._talk(secure)
        self.open_connections -= 1

    def _talk(self, peer: socket.socket) -> None:
        if not self._reads:
            self._handle(peer, b"")
            peer.recv(65536)
            return
        while request := read_request(peer):
            self.requests.append(request)
            self._handle(peer, request)

    def close(self) -> None:
        """Stop listening and wait for the connections to end."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=6)


def read_request(peer: socket.socket) -> bytes:
    """Return one complete request, or nothing at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := peer.recv(65536)):
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    while len(body) < length:
        if not (chunk := peer.recv(65536)):
            return b""
        body += chunk
    return head + b"\r\n\r\n" + body


def response(body: bytes = b"", *, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    """Return the bytes of a response with a Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def reset(peer: socket.socket) -> None:
    """Close with RST instead of FIN."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@contextmanager
def serving(handle: Handler, *, reads: bool = True, tls: ssl.SSLContext | None = None) -> Iterator[RawServer]:
    """Run a server that calls *handle* after each request, or at once if it never *reads*."""
    server = RawServer(handle, reads=reads, tls=tls)
    thread = threading.Thread(target=server.accept_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def sending(*chunks: bytes) -> Handler:
    """Return a handler that sends *chunks* and keeps the connection."""

    def handle(peer: socket.socket, _: bytes) -> None:
        for chunk in chunks:
            peer.sendall(chunk)

    return handle


def sending_then(end: Callable[[socket.socket], None], *chunks: bytes) -> Handler:
    """Return a handler that sends *chunks* and then applies *end* to the connection."""

    def handle(peer: socket.socket, _: bytes) -> None:
        for chunk in chunks:
            peer.sendall(chunk)
        end(peer)

    return handle


def ask(server: RawServer | str, kind: RequestKind = RequestKind.READ, **fields: object) -> WireRequest:
    """Return a request to *server*."""
    url = server if isinstance(server, str) else f"{server.url}/path"
    body = b"{}" if kind is RequestKind.SUBMIT else None
    return WireRequest(kind=kind, method="POST" if body else "GET", url=url, body=body, **fields)  # type: ignore[arg-type]
