"""Large files of rows: time from the start of `nanobanana batch` to the first POST, memory, and writes beside a report.

    python -m benchmarks.files [--rows 100000]

The command runs in a process of its own against a server of its own, and is killed once
200 rows are submitted. Then a report is written from a ledger of as many rows, while
another row is committed again and again: the longest commit is what the report delays.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from decimal import Decimal
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from benchmarks import launch
from benchmarks.server import KEY
from nanobanana_async import BatchRow, GenerationRequest, RowState, SavedImage, Task, TaskStatus, Verdict
from nanobanana_async.batch.report import ReportWriter
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.protocols import AttemptEnd

_IN_FLIGHT: Final = 200
_CHUNK: Final = 5000
_ALONE_S: Final = 2.0
"""How long commits are measured without a report."""


def first_post(rows: int, folder: Path) -> tuple[float, int]:
    """Return seconds to the first POST, and MiB of the process with 200 rows in flight."""
    path = folder / "rows.txt"
    with path.open("w") as file:
        file.writelines(f"a fox in the snow at night, number {number}, watercolour\n" for number in range(rows))
    with launch.server("--latency", "600") as port:
        variables = {"DEFAPI_API_KEY": KEY, "DEFAPI_BASE_URL": f"http://127.0.0.1:{port}"}
        command = [sys.executable, "-m", "nanobanana_async", "batch", str(path), "--out", str(folder / "run")]
        began_s = time.time()
        with subprocess.Popen(command, env={**os.environ, **variables}) as process:
            while len(truth := _truth(port)) < _IN_FLIGHT:
                time.sleep(0.05)
            time.sleep(1)
            status = Path(f"/proc/{process.pid}/status").read_text()
            process.kill()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None  # noqa: S101 - Linux
    return min(accepted_s for accepted_s, _, _ in truth.values()) - began_s, int(found[1]) // 1024


def _truth(port: str) -> dict[str, tuple[float, float, float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/truth", timeout=60) as response:
        return json.load(response)  # type: ignore[no-any-return]


async def report_delay(rows: int, folder: Path) -> tuple[float, float, float]:
    """Return seconds of a report over *rows* saved rows, and of the longest commit meanwhile and before."""
    ledger = await BatchLedger.open(folder, group_commit_s=0)
    try:
        await _fill(ledger, rows)
        took_s: list[float] = []

        async def commit() -> None:
            while True:
                began_s = anyio.current_time()
                await ledger.transition("0", RowState.SAVED, reason=None)
                took_s.append(anyio.current_time() - began_s)
                await anyio.sleep(0.005)

        async with anyio.create_task_group() as group:
            group.start_soon(commit)
            await anyio.sleep(_ALONE_S)
            alone_s, began_s = max(took_s), anyio.current_time()
            took_s.clear()
            writer = await anyio.to_thread.run_sync(ReportWriter, folder, [])
            with writer:
                async for page in ledger.pages():
                    await anyio.to_thread.run_sync(writer.add, page)
            group.cancel_scope.cancel()
        return anyio.current_time() - began_s, max(took_s), alone_s
    finally:
        await ledger.aclose()


async def _fill(ledger: BatchLedger, rows: int) -> None:
    """Insert saved rows through the public steps, many per transaction."""

    async def one(key: str) -> None:
        task = Task(task_id=f"ta-{key}", status=TaskStatus.SUCCESS, consumed=Decimal("0.5"))
        await ledger.begin_attempt(key)
        await ledger.end_attempt(key, AttemptEnd(verdict=Verdict.ACCEPTED, rule="task id", task_id=task.task_id))
        await ledger.transition(key, RowState.SUCCEEDED, consumed="0.5")
        image = SavedImage(path=ledger.folder / f"{key}.png", sha256="0" * 64, size_bytes=2_000_000)
        await ledger.record_saved(key, [image])

    for first in range(0, rows, _CHUNK):
        keys = [str(number) for number in range(first, min(rows, first + _CHUNK))]
        await ledger.upsert_rows(
            BatchRow(key=key, request=GenerationRequest(f"a fox in the snow, number {key}"), fingerprint=key)
            for key in keys
        )
        async with anyio.create_task_group() as group:
            for key in keys:
                group.start_soon(one, key)


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        seconds, mib = first_post(rows, Path(name))
        print(f"{rows:,} rows: first POST after {seconds:.1f} s, {mib} MiB at {_IN_FLIGHT} in flight")
    with tempfile.TemporaryDirectory() as name:
        took_s, longest_s, alone_s = anyio.run(report_delay, rows, Path(name))
        commits = f"longest commit meanwhile {longest_s * 1000:.0f} ms, and {alone_s * 1000:.0f} ms without a report"
        print(f"report over {rows:,} rows: {took_s:.1f} s, {commits}")


if __name__ == "__main__":
    main()
