"""Submits that take their time, and a service that throttles: how soon the images are there.

    python -m benchmarks.network [--jobs 1000]

Over real sockets on this machine, with default settings. A POST takes 0.8 s, as with TLS
and a distant service. "No bound" submits all jobs at once. Then the service allows 20
submits per second, with and without Retry-After. Each run has a server of its own with
the same latencies.
"""

import argparse
import asyncio
import json
import time
import urllib.request
from collections import Counter
from typing import Any, Final

import anyio

from benchmarks import launch
from benchmarks.server import KEY
from nanobanana_async import Limits, NanoBananaClient, NanoBananaError
from nanobanana_async.api import concurrency

_POST_S: Final = "0.8"
_ALLOWED_PER_S: Final = 20
_SETTLED_S: Final = 10.0
"""Time after which the rate of the service is expected to be known."""


async def generate(port: str, jobs: int, limits: Limits) -> dict[str, Any]:
    """Submit all jobs at once, and return when each was done, and the errors."""
    done_s: list[float] = []
    errors: Counter[str] = Counter()

    async def one(number: int) -> None:
        try:
            await client.generate(f"a fox, number {number}")
            done_s.append(time.time() - began_s)
        except NanoBananaError as exc:
            errors[type(exc).__name__] += 1

    began_s, cpu_s = time.time(), time.process_time()
    async with (
        NanoBananaClient(KEY, base_url=f"http://127.0.0.1:{port}", limits=limits) as client,
        anyio.create_task_group() as group,
    ):
        for number in range(jobs):
            group.start_soon(one, number)
    return {"began_s": began_s, "done_s": sorted(done_s), "errors": errors, "cpu_s": time.process_time() - cpu_s}


def measure(name: str, jobs: int, *options: str) -> tuple[dict[str, Any], list[float], list[float]]:
    """Return the record of one run, and when submits were accepted and throttled, from its start."""
    with launch.server("--latency", "12", *options) as port:
        record = launch.client("benchmarks.network", "--contestant", name, port, "--jobs", str(jobs))
        truth, throttled = (_get(port, path) for path in ("truth", "throttled"))
    accepted_s = sorted(accepted - record["began_s"] for accepted, _, _ in truth.values())
    return record, accepted_s, [at_s - record["began_s"] for at_s in throttled]


def _get(port: str, path: str) -> Any:  # noqa: ANN401 - JSON
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as response:
        return json.load(response)


def show_slow_posts(jobs: int) -> None:
    """Print when half, 95 % and all images were there, with the learned and with no bound on submits."""
    rows: dict[str, list[float]] = {}
    for name in ("default", "no bound"):
        record, _, _ = measure(name, jobs, "--submit-delay", _POST_S)
        done_s = record["done_s"]
        rows[name] = [done_s[int(share * (len(done_s) - 1))] for share in (0.5, 0.95, 1.0)]
        half_s, most_s, all_s = rows[name]
        failed = f", errors: {record['errors']}" if record["errors"] else ""
        print(f"POST {_POST_S} s, {name:9}: half {half_s:5.1f} s, 95 % {most_s:5.1f} s, all {all_s:5.1f} s{failed}")
    ratios = [mine / best for mine, best in zip(rows["default"], rows["no bound"], strict=True)]
    print(f"default / no bound: half {ratios[0]:.2f}x, 95 % {ratios[1]:.2f}x, all {ratios[2]:.2f}x")


def show_throttled(jobs: int) -> None:
    """Print how much of the allowed rate was used, and how many submits were throttled."""
    for options in ((), ("--no-retry-after",)):
        record, accepted_s, throttled_s = measure("default", jobs, "--allow", str(_ALLOWED_PER_S), *options)
        used = jobs / _ALLOWED_PER_S / accepted_s[-1]
        late = sum(at_s > _SETTLED_S for at_s in throttled_s)
        share = late / max(1, late + sum(at_s > _SETTLED_S for at_s in accepted_s))
        print(
            f"{_ALLOWED_PER_S} per second, {'without' if options else 'with'} Retry-After: {len(record['done_s'])} of "
            f"{jobs} done, {used:.0%} of the rate used, {len(throttled_s)} throttled, {share:.1%} after 10 s"
        )


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        name, port = options.contestant
        limits = Limits()
        if name != "default":  # what no setting of the client allows: all of them at once, from the start
            concurrency._START = options.jobs  # type: ignore[misc]
            limits = Limits(max_submits=options.jobs)
        print(json.dumps(asyncio.run(generate(port, options.jobs, limits))))
        return
    show_slow_posts(options.jobs)
    show_throttled(400)


if __name__ == "__main__":
    main()
