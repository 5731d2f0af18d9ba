"""A distant network: forwards bytes to a port with a round trip of so many milliseconds.

    python -m benchmarks.delay_proxy PORT --rtt 0.12 [--loss 0.01]

The kernel of this machine accepts a connection at once, so the proxy waits a round trip before it reads from a new one.
With `--loss`, that share of connections is reset within a second. Prints its port, and when its stdin ends, how many
connections were made.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import deque
from typing import Final, cast

import uvloop

_TICK_S: Final = 1e-4


class Side(asyncio.Protocol):
    """One end of a connection. What it receives leaves at the other end after a delay."""

    def __init__(self, delay_s: float) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes | None]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._put(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - part of the protocol
        """See `asyncio.Protocol`."""
        self._put(None)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def _put(self, data: bytes | None) -> None:
        due_s = self._loop.time() + self._delay_s
        self._queue.append((due_s, data))
        if len(self._queue) == 1:
            self._loop.call_at(due_s, self.flush)

    def flush(self) -> None:
        """Write what is due to the other end. Keep it while that is not connected."""
        if self.other is None or self.other.transport is None:
            return
        target = self.other.transport
        while self._queue and self._queue[0][0] <= self._loop.time() + _TICK_S:
            _, data = self._queue.popleft()
            if target.is_closing():
                continue
            if data is None:
                target.close()
            else:
                target.write(data)
        if self._queue:
            self._loop.call_at(self._queue[0][0], self.flush)


class Proxy:
    """Accepts connections and counts them."""

    def __init__(self, port: int, rtt_s: float, loss: float) -> None:
        self._port = port
        self._rtt_s = rtt_s
        self._loss = loss
        self._random = random.Random(0)
        self._connecting: set[asyncio.Task[None]] = set()
        self.connections = 0

    def accept(self) -> asyncio.Protocol:
        """Return the protocol of a new connection."""
        self.connections += 1
        side = Side(self._rtt_s / 2)
        task = asyncio.get_running_loop().create_task(self._connect(side))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return side

    async def _connect(self, side: Side) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._rtt_s)
        far = Side(self._rtt_s / 2)
        far.other = side
        await loop.create_connection(lambda: far, "127.0.0.1", self._port)
        side.other = far
        side.flush()
        if side.transport is not None and self._random.random() < self._loss:
            loop.call_later(self._random.random(), side.transport.abort)


async def serve(proxy: Proxy) -> None:
    """Serve until stdin ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(proxy.accept, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps(proxy.connections), flush=True)


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--rtt", type=float, default=0.12, help="round trip, in seconds")
    parser.add_argument("--loss", type=float, default=0.0, help="share of connections that are reset")
    options = parser.parse_args()
    uvloop.run(serve(Proxy(options.port, options.rtt, options.loss)))


if __name__ == "__main__":
    main()
