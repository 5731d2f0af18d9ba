"""Helpers for tests of the ledger of single tasks: clients with a ledger, and its rows as another program sees them."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nanobanana_async import (
    NanoBananaClient,
    SqliteLedger,
    TaskHandle,
)
from nanobanana_async.simulator import FAST_LIMITS, FAST_POLLING, Simulator
from tests.fakes import Intercept, InterceptingTransport


@asynccontextmanager
async def client_of(
    simulator: Simulator, folder: Path, intercept: Intercept | None = None, **options: object
) -> AsyncIterator[NanoBananaClient]:
    """Yield a client with a ledger in *folder*. Other options are those of the ledger or of the client."""
    settings = {name: options.pop(name) for name in ("store_requests", "keep_days") if name in options}
    ledger = SqliteLedger(folder, group_commit_s=0, **settings)  # type: ignore[arg-type]
    transport = simulator if intercept is None else InterceptingTransport(simulator, intercept)
    fast = {"limits": FAST_LIMITS, "polling": FAST_POLLING, **options}
    async with NanoBananaClient("dk-test", transport=transport, ledger=ledger, **fast) as client:  # type: ignore[arg-type]
        yield client


async def resumed(client: NanoBananaClient) -> list[TaskHandle]:
    """Return what `resume` yields."""
    return [handle async for handle in client.resume()]


def rows(folder: Path) -> list[sqlite3.Row]:
    """Return the rows of all files, as another program sees them."""
    found: list[sqlite3.Row] = []
    for path in sorted(folder.glob("tasks-*.db")):
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        db.row_factory = sqlite3.Row
        found += db.execute("SELECT * FROM rows LEFT JOIN attempts USING (key, attempt) ORDER BY number").fetchall()
        db.close()
    return found
