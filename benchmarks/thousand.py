"""One client, a thousand concurrent `generate` calls, real sockets: CPU, memory, and the longest stall of the loop.

    python benchmarks/thousand.py [--tasks 1000] [--latency 20] [--backend asyncio]

The simulator runs in a process of its own, so that all figures are the client's. The default latency is the real
service's (median 20 s, lognormal); nothing is scaled.
"""

import argparse
import resource
import time

import anyio

from nanobanana_async import Limits, NanoBananaClient
from nanobanana_async.simulator import VendorProfile
from nanobanana_async.simulator.process import simulator_process

TICK_S = 0.02
PRICE = VendorProfile().price


class StallMeter:
    """Sleeps for 20 ms again and again, and notes how much longer it took at the worst."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            before_s = time.perf_counter()
            await anyio.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - before_s - TICK_S)


async def measure(tasks: int, latency_s: float) -> None:
    """Run the benchmark and print its figures."""
    async with simulator_process("--latency", str(latency_s)) as simulator:
        stalls, done = StallMeter(), 0
        rss_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with NanoBananaClient(simulator.key, base_url=simulator.url) as client:

            async def one(number: int) -> None:
                nonlocal done
                await client.generate(f"picture {number}", timeout_s=600)
                done += 1

            before = await client.balance()
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            async with anyio.create_task_group() as meter:
                meter.start_soon(stalls.run)
                async with anyio.create_task_group() as group:
                    for number in range(tasks):
                        group.start_soon(one, number)
                meter.cancel_scope.cancel()
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            paid = (before - await client.balance()) / PRICE
    rss_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"finished           {done} of {tasks} in {wall_s:.1f} s (requests paced at {Limits().requests_per_s:.0f}/s)")
    print(f"charged            {paid:.0f} times")
    print(f"client CPU         {cpu_s:.2f} s, {cpu_s / tasks * 1e3:.2f} ms per picture")
    print(f"peak RSS           {rss_kib / 1024:.1f} MiB ({rss_before_kib / 1024:.1f} MiB before the first call)")
    print(f"longest loop stall {stalls.longest_s * 1e3:.1f} ms")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=20.0, help="median seconds per picture")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    options = parser.parse_args()
    anyio.run(measure, options.tasks, options.latency, backend=options.backend)


if __name__ == "__main__":
    main()
