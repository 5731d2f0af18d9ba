"""Cost of one poll: this package against httpx, aiohttp and a raw socket loop.

    python -m benchmarks.polls [--polls 4000] [--in-flight 64] [--delays 0.1 0]

One server takes 0.1 s to respond, as across a network. The other responds at once, so few requests are really in flight
together. All clients poll the same unfinished task on the same server, in a process of its own; the CPU is that of the
client. The figure of this package includes rate limiter, transport, decoding and snapshot. "Grouped" and "single" are
200 polls per second that leave twenty at a time or one by one, which is why the tracker groups polls that are due.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from benchmarks import launch
from benchmarks.server import KEY
from nanobanana_async import AiohttpTransport, HttpxTransport, Limits, NanoBananaClient

HEADERS: Final = {"Authorization": f"Bearer {KEY}", "Accept": "application/json"}

Poll: TypeAlias = Callable[[], Awaitable[object]]


async def cpu_ms(poll: Poll, polls: int, in_flight: int) -> float:
    """Return CPU milliseconds per poll, with *in_flight* polls at a time."""

    async def worker(share: int) -> None:
        for _ in range(share):
            await poll()

    await asyncio.gather(*(worker(2) for _ in range(in_flight)))  # opens connections and fills caches
    before_s = time.process_time()
    await asyncio.gather(*(worker(polls // in_flight) for _ in range(in_flight)))
    return (time.process_time() - before_s) / (polls // in_flight * in_flight) * 1e3


async def paced_ms(poll: Poll, polls: int, group: int, per_s: float) -> float:
    """Return CPU milliseconds per poll at *per_s* polls per second, sent in groups of *group*."""
    before_s = time.process_time()
    for _ in range(polls // group):
        leaving = asyncio.gather(*(poll() for _ in range(group)))
        await asyncio.sleep(group / per_s)
        await leaving
    return (time.process_time() - before_s) / (polls // group * group) * 1e3


async def with_httpx(url: str, polls: int, in_flight: int) -> float:
    """Poll with one `httpx.AsyncClient` that has as many connections as polls in flight."""
    import httpx

    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(headers=HEADERS, limits=limits, timeout=60) as client:

        async def poll() -> object:
            return (await client.get(url)).json()

        return await cpu_ms(poll, polls, in_flight)


async def with_aiohttp(url: str, polls: int, in_flight: int) -> float:
    """Poll with one `aiohttp.ClientSession`."""
    import aiohttp

    async with aiohttp.ClientSession(headers=HEADERS, connector=aiohttp.TCPConnector(limit=in_flight)) as session:

        async def poll() -> object:
            async with session.get(url) as response:
                return json.loads(await response.read())

        return await cpu_ms(poll, polls, in_flight)


async def with_sockets(url: str, polls: int, in_flight: int) -> float:
    """Poll with asyncio streams and minimal HTTP: a lower bound, not a client."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    lines = [f"GET /{path} HTTP/1.1", f"Host: {host}", *(f"{key}: {value}" for key, value in HEADERS.items())]
    request = "\r\n".join([*lines, "", ""]).encode()
    idle: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.LifoQueue()
    for _ in range(in_flight):
        idle.put_nowait(await asyncio.open_connection(name, int(port)))

    async def poll() -> object:
        reader, writer = await idle.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        document = json.loads(await reader.readexactly(length))
        idle.put_nowait((reader, writer))
        return document

    cost_ms = await cpu_ms(poll, polls, in_flight)
    while not idle.empty():
        idle.get_nowait()[1].close()
    return cost_ms


async def measure(base_url: str, polls: int, in_flight: int) -> None:
    """Measure all clients and print the ratios."""
    limits = Limits(max_polls=in_flight, requests_per_s=1e6, burst=1_000_000)
    async with (
        NanoBananaClient(KEY, base_url=base_url, limits=limits, transport=HttpxTransport()) as client,
        NanoBananaClient(KEY, base_url=base_url, limits=limits, transport=AiohttpTransport()) as lean,
    ):
        handle = await client.submit("a job")
        await asyncio.sleep(1.5)  # a new id is invisible for a moment
        url = f"{base_url}/api/task/query?task_id={handle.task_id}"
        ours = await cpu_ms(handle.query, polls, in_flight)
        rows = [
            ("nanobanana_async", ours),
            ("  with AiohttpTransport", await cpu_ms(lean.task(handle.task_id).query, polls, in_flight)),
            ("httpx.AsyncClient", await with_httpx(url, polls, in_flight)),
            ("aiohttp.ClientSession", await with_aiohttp(url, polls, in_flight)),
            ("raw asyncio streams", await with_sockets(url, polls, in_flight)),
        ]
        print(f"CPU per poll, {in_flight} in flight, {polls} polls each")
        for name, cost_ms in rows:
            print(f"  {name:24} {cost_ms:7.3f} ms  {cost_ms / ours:6.2f}x")
        grouped, single = await paced_ms(handle.query, 800, 20, 200), await paced_ms(handle.query, 800, 1, 200)
        print("CPU per poll at 200 polls per second")
        print(f"  grouped by twenty        {grouped:7.3f} ms\n  single                   {single:7.3f} ms")
        print(f"  ratio                    {grouped / single:7.2f}")


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polls", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0.1, 0.0], help="response time of the server, in seconds"
    )
    options = parser.parse_args()
    for delay_s in options.delays:
        with launch.server("--latency", "1e6", "--delay", str(delay_s)) as port:
            print(f"\nresponse time {delay_s:g} s")
            asyncio.run(measure(f"http://127.0.0.1:{port}", options.polls, options.in_flight))


if __name__ == "__main__":
    main()
