"""Cost of a ledger for single tasks: the same tasks with and without one.

    python -m benchmarks.ledger [--tasks 1000] [--repeat 3]

Runs over real sockets with the default settings and a POST of 5 ms. Runs alternate,
each in a process of its own with a server of its own. The last line compares the medians.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import tempfile
import time
import urllib.request
from typing import Any, Final

import anyio

from benchmarks import launch
from benchmarks.server import KEY
from benchmarks.stall import StallMeter
from nanobanana_async import NanoBananaClient, SqliteLedger

_SUBMIT_DELAY_S: Final = 0.005


async def generate(client: NanoBananaClient, tasks: int, *, is_recorded: bool) -> None:
    """Run all tasks at once, and acknowledge them if there is a ledger."""

    async def one(number: int) -> None:
        handle = await client.submit(f"a fox, number {number}", owner=f"user {number % 50}")
        await handle.result()
        if is_recorded:
            await handle.ack()

    async with anyio.create_task_group() as group:
        for number in range(tasks):
            group.start_soon(one, number)


def contestant(name: str, port: str, tasks: int) -> None:
    """Run one of the two and print its figures."""
    meter = StallMeter()

    async def run(folder: str) -> None:
        ledger = SqliteLedger(folder) if name == "ledger" else None
        async with NanoBananaClient(KEY, base_url=f"http://127.0.0.1:{port}", ledger=ledger) as client:
            await generate(client, tasks, is_recorded=ledger is not None)

    gc.freeze()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(asyncio.SelectorEventLoop(meter)) as loop:
        began_s, cpu_s = time.time(), time.process_time()
        loop.run_until_complete(run(folder))
        figures = {"began_s": began_s, "cpu_s": time.process_time() - cpu_s, "stall_s": meter.longest_s}
    print(json.dumps(figures))


def measure(name: str, tasks: int) -> dict[str, float]:
    """Return CPU seconds, time of the last submit, and the longest stall of the event loop."""
    with launch.server("--latency", "6", "--submit-delay", str(_SUBMIT_DELAY_S)) as port:
        figures: dict[str, Any] = launch.client("benchmarks.ledger", "--contestant", name, port, "--tasks", str(tasks))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/truth", timeout=60) as response:
            truth = json.load(response)
    assert len(truth) == tasks  # noqa: S101 - each was submitted once
    last_s = max(accepted_s for accepted_s, _, _ in truth.values()) - figures.pop("began_s")
    return {**figures, "last_submit_s": last_s}


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        name, port = options.contestant
        contestant(name, port, options.tasks)
        return
    print(f"{'':8} {'CPU s':>7} {'last submit s':>14} {'stall ms':>9}")
    runs: dict[str, list[dict[str, float]]] = {"bare": [], "ledger": []}
    for _ in range(options.repeat):
        for name, figures in runs.items():
            figures.append(measure(name, options.tasks))
            last = figures[-1]
            print(
                f"{name:8} {last['cpu_s']:7.2f} {last['last_submit_s']:14.2f} {last['stall_s'] * 1e3:9.0f}", flush=True
            )
    cpu, submit = (
        statistics.median(run[fact] for run in runs["ledger"]) / statistics.median(run[fact] for run in runs["bare"])
        - 1
        for fact in ("cpu_s", "last_submit_s")
    )
    stall_ms = max(run["stall_s"] for run in runs["ledger"]) * 1e3
    print(f"with a ledger: {cpu:+.1%} CPU, last submit {submit:+.1%} later, longest stall {stall_ms:.0f} ms")


if __name__ == "__main__":
    main()
