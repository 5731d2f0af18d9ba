"""One run of a batch in a process of its own that kills itself after a given number of crash points."""

import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import attrs

from nanobanana_async import Batch, NanoBananaClient, WireRequest
from nanobanana_async.simulator import FAST_LIMITS, FAST_POLLING
from nanobanana_async.transport.httpx import HttpxTransport

NEVER = 10**9


@attrs.frozen
class Plan:
    """The task of a child process."""

    url: str
    folder: Path
    prompts: tuple[str, ...]
    kill_at: int
    """The crash point, counted from 0."""
    log: Path
    """Where the names of the points go, a line each as it is passed."""


def run(plan: Plan) -> None:
    """Run the batch to its end, or to the point where it dies."""
    with plan.log.open("ab", buffering=0) as log:
        arm(plan.kill_at, log.write)
        anyio.run(_batch, plan)


async def _batch(plan: Plan) -> None:
    async with (
        NanoBananaClient("dk-test", base_url=plan.url, limits=FAST_LIMITS, polling=FAST_POLLING) as client,
        Batch.open(plan.folder, client, group_commit_s=0.002) as batch,
    ):
        async for _ in batch.run(plan.prompts, max_in_flight=4):
            pass


def arm(kill_at: int, write: Callable[[bytes], object]) -> None:
    """Put crash points around each step that leaves something behind, and die at one of them."""
    passed = 0

    def point(name: str) -> None:
        nonlocal passed
        write(f"{name}\n".encode())
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    _around_commits(point)
    _around_posts(point)
    _around_files(point)


class _Connection(sqlite3.Connection):
    """Records what a transaction contains, and when it is written and durable."""

    point: Callable[[str], None]
    about: set[str]

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:  # noqa: ANN401 - the signature of sqlite3
        if sql.startswith("BEGIN"):
            self.about = set()
        elif sql.startswith("INSERT INTO attempts"):
            self.about.add("intent")
        elif sql.startswith("UPDATE attempts SET state = ?"):
            self.about.add(str(values[0]))
        elif sql.startswith("INSERT INTO rows"):
            self.about.add("entry")
        elif sql.startswith("UPDATE rows SET acknowledged_at"):
            self.about.add("acknowledged")
        if sql != "COMMIT":
            return super().execute(sql, values)
        for name in sorted(self.about):
            self.point(f"{name} written")
        done = super().execute(sql)
        for name in sorted(self.about):
            self.point(f"{name} durable")
        return done


def _around_commits(point: Callable[[str], None]) -> None:
    connect = sqlite3.connect

    def connected(*args: Any, **options: Any) -> sqlite3.Connection:  # noqa: ANN401 - the signature of sqlite3
        connection = connect(*args, factory=_Connection, **options)
        connection.about = set()
        connection.point = point
        return connection

    sqlite3.connect = connected  # type: ignore[assignment]


def _around_posts(point: Callable[[str], None]) -> None:
    send = HttpxTransport.send

    async def watched(self: HttpxTransport, request: WireRequest, **options: Any) -> Any:  # noqa: ANN401 - passed through
        if request.method == "POST":
            point("POST leaves")
        response = await send(self, request, **options)
        if request.method == "POST":
            point("POST responded")
        return response

    HttpxTransport.send = watched  # type: ignore[method-assign]


def _around_files(point: Callable[[str], None]) -> None:
    create, replace = os.open, Path.replace

    def watched_create(path: Any, *rest: Any) -> int:  # noqa: ANN401 - passed through
        descriptor = create(path, *rest)
        if str(path).endswith(".part"):
            point("image half written")
        return descriptor

    def watched_replace(self: Path, target: Path) -> Path:
        is_image = target.suffix == ".png"
        if is_image:
            point("image written")
        replaced = replace(self, target)
        if is_image:
            point("image renamed")
        return replaced

    os.open, Path.replace = watched_create, watched_replace  # type: ignore[assignment,method-assign]
