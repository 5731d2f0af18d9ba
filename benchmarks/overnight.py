"""Cost of a ledger: the same rows with one, and with only submit, poll and save.

    python -m benchmarks.overnight [--rows 500 5000] [--in-flight 400] [--repeat 2]

Runs over real sockets, with images of a few bytes, a median latency of 2 s and no rate limit, so that the work itself
is measured. Both write each image durably. Runs alternate, each in a process of its own with a server of its own.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import anyio

from benchmarks import launch
from nanobanana_async import Batch, Limits, NanoBananaClient, PollPolicy, Succeeded
from nanobanana_async.images.files import FileImageStore

LIMITS: Final = Limits(requests_per_s=10_000, burst=1_000, max_submits=32)
POLLING: Final = PollPolicy.backoff(first_poll_s=2.0, initial_s=1.0, multiplier=1.2, max_s=4.0)


async def bare(client: NanoBananaClient, folder: Path, rows: int, in_flight: int) -> int:
    """Generate and save the images without a ledger."""
    done = 0
    store = FileImageStore(folder)
    places = anyio.Semaphore(in_flight)

    async def one(number: int) -> None:
        nonlocal done
        try:
            task = await client.generate(f"row {number}")
            await client.store(task.images[0], store, str(number))
            done += 1
        finally:
            places.release()

    async with anyio.create_task_group() as group:
        for number in range(rows):
            await places.acquire()
            group.start_soon(one, number)
    return done


async def ledger(client: NanoBananaClient, folder: Path, rows: int, in_flight: int) -> int:
    """Generate and save the images with a ledger."""
    async with Batch.open(folder, client) as batch:
        outcomes = batch.run((f"row {n}" for n in range(rows)), max_in_flight=in_flight)
        return sum([isinstance(outcome, Succeeded) async for outcome in outcomes])


async def contestant(name: str, port: str, rows: int, in_flight: int) -> None:
    """Run one of the two and print its figures."""
    with tempfile.TemporaryDirectory() as folder:
        began_s, cpu_s = time.monotonic(), time.process_time()
        url = f"http://127.0.0.1:{port}"
        async with NanoBananaClient("dk-test", base_url=url, limits=LIMITS, polling=POLLING) as client:
            done = await {"bare": bare, "ledger": ledger}[name](client, Path(folder), rows, in_flight)
        figures = {
            "done": done,
            "wall_s": time.monotonic() - began_s,
            "cpu_s": time.process_time() - cpu_s,
            "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    print(json.dumps(figures))


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--in-flight", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        name, port = options.contestant
        anyio.run(contestant, name, port, options.rows[0], options.in_flight)
        return
    print(f"{'rows':>6} {'':8} {'done':>6} {'wall s':>8} {'rows/s':>8} {'CPU ms/row':>11} {'RSS MiB':>8}")
    for rows in options.rows:
        walls: dict[str, list[float]] = {"bare": [], "ledger": []}
        for _ in range(options.repeat):
            for name, times in walls.items():
                with launch.server("--latency", "2") as port:
                    figures = launch.client(
                        "benchmarks.overnight",
                        "--contestant",
                        name,
                        port,
                        "--rows",
                        str(rows),
                        "--in-flight",
                        str(options.in_flight),
                    )
                times.append(figures["wall_s"])
                print(
                    f"{rows:6d} {name:8} {figures['done']:6d} {figures['wall_s']:8.2f} {rows / figures['wall_s']:8.1f}"
                    f" {figures['cpu_s'] / rows * 1e3:11.2f} {figures['rss_mib']:8.0f}",
                    flush=True,
                )
        overhead = statistics.median(walls["ledger"]) / statistics.median(walls["bare"]) - 1
        print(f"{rows:6d} rows: the ledger takes {overhead:+.1%} of the time")


if __name__ == "__main__":
    main()
