"""Polls per image and notice delay with callbacks, without callbacks, and with all callbacks lost.

    python -m benchmarks.callbacks [--jobs 1000] [--latency 12]

Everything is on loopback. The service, in a process of its own, posts to uvicorn, which serves the receiver in the
client's event loop.
"""

import argparse
import contextlib
import json
import statistics
import time
import urllib.request

import anyio
import uvicorn

from benchmarks import launch
from nanobanana_async import CallbackReceiver, NanoBananaClient, TaskHandle
from nanobanana_async.simulator.server import open_listener


async def contestant(kind: str, port: str, jobs: int) -> None:
    """Generate *jobs* images, and print the time at which the end of each was noticed."""
    noticed_s: dict[str, float] = {}
    socket = open_listener("127.0.0.1", 0)
    public = f"http://127.0.0.1:{socket.getsockname()[1] if kind == 'callbacks' else 9}"
    async with NanoBananaClient("dk-test", base_url=f"http://127.0.0.1:{port}") as client:
        receiver = None if kind == "polls" else CallbackReceiver(client, public_url=public, secret="s" * 32)

        async def one(number: int) -> None:
            handle: TaskHandle = await client.submit(f"job {number}", callback=receiver)
            await handle.wait()
            noticed_s[handle.task_id] = time.time()

        server = uvicorn.Server(uvicorn.Config(receiver or launch.nothing, log_level="error", access_log=False))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        async with anyio.create_task_group() as serving:
            serving.start_soon(server.serve, [socket])
            async with anyio.create_task_group() as group:
                for number in range(jobs):
                    group.start_soon(one, number)
            serving.cancel_scope.cancel()
    print(json.dumps(noticed_s))


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=12.0, help="median seconds per job")
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        kind, port, jobs = options.contestant
        anyio.run(contestant, kind, port, int(jobs))
        return
    print(f"{'':10} {'finished':>10} {'polls':>6} {'median s':>9} {'p95 s':>7}")
    for kind in ("callbacks", "polls", "lost"):
        with launch.server("--latency", str(options.latency)) as port:
            arguments = ("--contestant", kind, port, str(options.jobs))
            noticed_s: dict[str, float] = launch.client("benchmarks.callbacks", *arguments)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/truth", timeout=60) as response:
                truth = json.load(response)
        delays_s = sorted(at_s - truth[task_id][1] for task_id, at_s in noticed_s.items())
        polls = sum(count for _, _, count in truth.values()) / len(noticed_s)
        p95_s = delays_s[int(0.95 * (len(delays_s) - 1))]
        finished = f"{len(noticed_s)}/{options.jobs}"
        print(f"{kind:10} {finished:>10} {polls:6.2f} {statistics.median(delays_s):9.3f} {p95_s:7.2f}", flush=True)


if __name__ == "__main__":
    main()
