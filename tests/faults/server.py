"""The fault server: raw sockets, scripted by the path, with a record of what was read and charged.

A base URL is `http://host:port/<fault index>/<times>/<nonce>`: the fault is played for the first *times* requests of
each method, and later responses are correct. `GET /truth/<nonce>` returns the record. Run it as `python -m
tests.faults.server`; it prints its ports as one line of JSON and ends with its stdin.
"""

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections import Counter, defaultdict

import attrs

from tests.faults.table import FAULTS, message

SILENCE_S = 8.0


@attrs.define
class Truth:
    """The record of one client."""

    seen: Counter[str] = attrs.field(factory=Counter)
    charged: list[str] = attrs.field(factory=list)


TRUTHS: defaultdict[str, Truth] = defaultdict(Truth)


@attrs.define
class Connection:
    """One end of a connection; a `Peer`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    good: bytes = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def drip(self, data: bytes) -> None:
        for byte in data:
            await self.send(bytes([byte]))
            await asyncio.sleep(0.05)

    async def flood(self, head: bytes, chunk: bytes) -> None:
        await self.send(head)
        for _ in range(2**30 // len(chunk)):
            await self.send(chunk)

    async def hang(self) -> None:
        await asyncio.sleep(SILENCE_S)

    def reset(self) -> None:
        peer = self.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def read_request(self) -> tuple[str, str] | None:
        """Return method and path of one complete request; None at the end."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = head.split("\r\n")
            lengths = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
            await self.reader.readexactly(sum(lengths))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        method, path, _ = lines[0].split(" ", 2)
        return method, path


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read requests and play their faults until the connection ends."""
    connection = Connection(reader, writer)
    with contextlib.suppress(ConnectionError):
        while request := await connection.read_request():
            if not await respond_once(connection, *request):
                break
    writer.close()


async def respond_once(connection: Connection, method: str, path: str) -> bool:
    """Respond to one request; return False if the connection is to end."""
    _, first, *rest = path.split("/")
    if first == "truth":
        await connection.send(message(json.dumps(attrs.asdict(TRUTHS[rest[0]])).encode()))
        return True
    fault, times, nonce = FAULTS[int(first)], int(rest[0]), rest[1]
    truth = TRUTHS[nonce]
    truth.seen[method] += 1
    faulty = truth.seen[method] <= times
    data: dict[str, object] = {"task_id": "ta-1", "status": "pending", "result": None}
    if method == "POST":
        data = {"task_id": f"ta-{nonce}-{truth.seen[method]}"}
        if fault.charges or not faulty:
            truth.charged.append(str(data["task_id"]))
    connection.good = json.dumps({"code": 0, "message": "ok", "data": data}).encode()
    if not faulty:
        await connection.send(message(connection.good))
        return True
    await fault.play(connection)
    return False


async def act_before_reading(how: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Play a fault that happens before a byte is read."""
    connection = Connection(reader, writer)
    if how == "rst":
        connection.reset()
    elif how == "hang":
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket transport can
        await connection.hang()
    writer.close()


async def main() -> None:
    """Listen, print the ports, and serve until stdin ends."""
    ports = {}
    for how in ("main", "fin", "rst", "hang"):
        handler = serve if how == "main" else lambda r, w, how=how: act_before_reading(how, r, w)
        server = await asyncio.start_server(handler, "127.0.0.1", 0, limit=2**16)
        ports[how] = server.sockets[0].getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        ports["closed"] = closed.getsockname()[1]
    # A listener that accepts nothing, with its queue filled: the kernel drops every further SYN.
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            filler.connect(full.getsockname())
    ports["full"] = full.getsockname()[1]
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
