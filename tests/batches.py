"""Helpers for tests of batches: a simulated service, an intercepted transport, and runs of rows."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nanobanana_async import (
    Batch,
    ExchangeError,
    LedgerRow,
    NanoBananaClient,
    NanoBananaError,
    Outcome,
    WireRequest,
    WireResponse,
)
from nanobanana_async.simulator import Simulator, SimulatorProfile
from tests.fakes import Intercept, InterceptingTransport

SLOW = SimulatorProfile(median_s=30, sigma=0.3, visibility_delay_s=0)
FOXES = [f"fox {number}" for number in range(12)]


def nth_post(respond: Callable[[int], WireResponse | ExchangeError | None]) -> Intercept:
    """Return an interceptor that replaces the response to the nth POST, counted from 0."""
    count = -1

    def intercept(request: WireRequest) -> WireResponse | ExchangeError | None:
        nonlocal count
        if request.method != "POST":
            return None
        count += 1
        return respond(count)

    return intercept


def client_of(simulator: Simulator, intercept: Intercept | None = None, **options: object) -> NanoBananaClient:
    """Return a client of the simulator with an interceptor between them."""
    if intercept is not None:
        options["wrap"] = lambda transport: InterceptingTransport(transport, intercept)
    return simulator.client(**options)  # type: ignore[arg-type]


@asynccontextmanager
async def batch_of(
    simulator: Simulator, folder: Path, intercept: Intercept | None = None, **options: object
) -> AsyncIterator[Batch]:
    """Open a batch with a client of its own, whose options are those of `Simulator.client`."""
    batch_options = {
        name: options.pop(name) for name in ("budget", "max_price", "image_store", "callback") if name in options
    }
    async with (
        client_of(simulator, intercept, **options) as client,
        Batch.open(folder, client, group_commit_s=0, **batch_options) as batch,  # type: ignore[arg-type]
    ):
        yield batch


async def run(batch: Batch, rows: Iterable[object] = FOXES, **options: object) -> dict[str, Outcome]:
    """Run the batch and return the outcomes by prompt."""
    outcomes = batch.run(rows, **options)  # type: ignore[arg-type]
    return {outcome.request.prompt: outcome async for outcome in outcomes}


async def run_until_stopped(
    batch: Batch, rows: Iterable[object] = FOXES, **options: object
) -> tuple[dict[str, Outcome], NanoBananaError]:
    """Run a batch that stops, and return the outcomes by prompt and the error."""
    ended: dict[str, Outcome] = {}

    async def consume() -> None:
        async for outcome in batch.run(rows, **options):  # type: ignore[arg-type]
            ended[outcome.request.prompt] = outcome

    with pytest.raises(NanoBananaError) as caught:
        await consume()
    return ended, caught.value


def kinds(outcomes: dict[str, Outcome]) -> list[str]:
    """Return the sorted class names of the outcomes."""
    return sorted(type(outcome).__name__ for outcome in outcomes.values())


async def rows_of(batch: Batch) -> list[LedgerRow]:
    """Return the rows of the ledger while its batch holds the lock."""
    return await batch._ledger.list_rows()  # noqa: SLF001 - no other connection can read a locked ledger
