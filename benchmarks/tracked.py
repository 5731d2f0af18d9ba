"""Memory and CPU of a tracked task, with up to a million tracked at once.

    python -m benchmarks.tracked [--tracked 1000 10000 100000 1000000]

One tracker, in a process of its own for each number, tracks tasks that were just submitted, in virtual time over an
in-memory source. Memory is what Python allocates per task (tracemalloc), with its id and one waiter that waits. Then
a minute passes in which polls become due; CPU is per poll and per tracked task.
"""

import argparse
import asyncio
import gc
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Final

import anyio

from nanobanana_async import PollPolicy, Task, TaskStatus
from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async._concurrency.slots import Slot, SlotPool
from nanobanana_async.tracking.schedule import PollSchedule
from nanobanana_async.tracking.state import SubmitInfo, Waiter
from nanobanana_async.tracking.tracker import TaskTracker
from tests.virtual_time import VirtualLoop

ROOT: Final = Path(__file__).parent.parent
POLLS_PER_S: Final = 1000.0
MINUTE_S: Final = 60.0


class Source:
    """Returns at once that the task is still in progress, a thousand times a second."""

    polls_per_s = POLLS_PER_S

    def __init__(self, background: BackgroundTaskGroup) -> None:
        self._pool = SlotPool(1000, background.start_soon)

    async def acquire_poll_slot(self) -> Slot:
        """Wait for the next thousandth of a second."""
        await anyio.sleep(1 / POLLS_PER_S)
        return await self._pool.acquire()

    async def poll(self, task_id: str) -> Task:
        """Return a snapshot."""
        return Task(task_id=task_id, status=TaskStatus.IN_PROGRESS)


def track(tracked: int, tracker: TaskTracker) -> list[Waiter]:
    """Track that many tasks, and return their waiters."""
    now_s = anyio.current_time()
    return [
        tracker.track(f"ta{number:08d}-1234-1234-1234-123456789abc", SubmitInfo(submitted_at_s=now_s, kind="m"))[1]
        for number in range(tracked)
    ]


async def allocate(tracked: int, tracker: TaskTracker) -> float:
    """Return the bytes per task that is tracked and has a waiting waiter."""
    loop = asyncio.get_running_loop()
    gc.collect()
    tracemalloc.start()
    waiters = track(tracked, tracker)
    for waiter in waiters:
        waiter.event = OneShotEvent()
        waiter.event._waiter = loop.create_future()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] / tracked
    tracemalloc.stop()
    tracker.close()
    return size


async def measure(tracked: int) -> None:
    """Track that many tasks and print a line."""
    background = BackgroundTaskGroup()
    await background.ensure_started()
    tracker = TaskTracker(Source(background), PollSchedule(PollPolicy()), background)
    size = await allocate(tracked, tracker)
    tracker = TaskTracker(Source(background), PollSchedule(PollPolicy()), background)
    gc.collect()
    cpu_s = time.process_time()
    track(tracked, tracker)
    track_us = (time.process_time() - cpu_s) / tracked * 1e6
    cpu_s = time.process_time()
    await anyio.sleep(MINUTE_S)
    cpu_s = time.process_time() - cpu_s
    polls = tracker.statistics().polls
    print(
        f"{tracked:9,d} {size:9.0f} {track_us:11.1f} {polls:9,d} {cpu_s / max(polls, 1) * 1e6:12.0f}"
        f" {cpu_s / tracked * 1e6:14.1f}",
        flush=True,
    )
    tracker.close()
    await background.aclose(drain_s=1)


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracked", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(measure(options.one))
        return
    print(f"{'tracked':>9} {'bytes':>9} {'us to track':>11} {'polls/min':>9} {'us per poll':>12} {'us/task/min':>14}")
    for tracked in options.tracked:
        subprocess.run([sys.executable, "-m", "benchmarks.tracked", "--one", str(tracked)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
