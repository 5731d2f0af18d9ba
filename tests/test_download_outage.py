"""A2: downloads that fail for all rows stop the submits, as submits that fail do."""

from pathlib import Path

import anyio
import pytest

from nanobanana_async import ImageError, Limits, RetryPolicy, RowState, WireRequest, WireResponse
from nanobanana_async.simulator import FAST_PROFILE, Simulator
from tests.batches import batch_of, kinds, rows_of, run, run_until_stopped
from tests.fakes import Intercept, response

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time, pytest.mark.usefixtures("no_threads")]

ROWS = [f"fox {number}" for number in range(24)]
QUICK = RetryPolicy(attempts=1, initial_s=0.01, max_s=0.01)


def file_host(respond: "list[int] | int") -> Intercept:
    """Return an interceptor that gives downloads these statuses in turn, then none; or one status for ever."""

    def intercept(request: WireRequest) -> WireResponse | None:
        if "/files/" not in request.url:
            return None
        if isinstance(respond, int):
            return response(respond, body=b"denied")
        return response(status, body=b"denied") if respond and (status := respond.pop(0)) != 200 else None

    return intercept


async def test_a2_a_host_that_refuses_all_ends_a_run_that_has_saved_nothing(tmp_path: Path) -> None:
    """A few rows are charged, not all, and the next run downloads them."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path, file_host(403), retry=QUICK) as batch:
        _, cause = await run_until_stopped(batch, ROWS, max_in_flight=2)
        records = [row for row in await rows_of(batch) if row.state is RowState.SUCCEEDED]
    assert isinstance(cause, ImageError)
    assert "HTTP 403" in str(cause)
    assert len(simulator.charges) <= 5
    assert any("HTTP 403" in (row.reason or "") for row in records), "the manifest says why"
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, ROWS)) == ["Succeeded"] * 24
        assert all(row.reason is None for row in await rows_of(batch))
    assert len(simulator.charges) == 24


async def test_a2_a_host_that_recovers_is_waited_for(tmp_path: Path) -> None:
    """Nothing is submitted meanwhile. All but the images that failed first are saved in the same run."""
    simulator = Simulator(FAST_PROFILE, delay_s=0.5)
    limits = Limits(max_submits=2, requests_per_s=10_000, burst=1_000)
    waits: list[tuple[str, int]] = []
    host = file_host([200] + [503] * 40)
    async with batch_of(simulator, tmp_path, host, retry=QUICK, limits=limits) as batch:

        async def watch() -> None:
            while True:
                await anyio.sleep(1)
                if (error := batch.progress().last_error) is not None:
                    waits.append((error, len(simulator.charges)))

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            outcomes = await run(batch, ROWS)
            group.cancel_scope.cancel()
    assert kinds(outcomes) == ["Failed"] * 2 + ["Succeeded"] * 22
    assert all("HTTP 503" in error for error, _ in waits), "the display says what is waited for"
    assert waits[0][1] == waits[-1][1] < 24, "nothing is submitted meanwhile"
    assert batch.progress().last_error is None


async def test_a2_images_of_an_earlier_run_that_are_gone_stop_nothing(tmp_path: Path) -> None:
    """Their URLs may have expired, which says nothing about new images."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path, file_host(403), retry=QUICK) as batch:
        await run_until_stopped(batch, ROWS[:8], max_in_flight=8)
    gone = {charge.prompt for charge in simulator.charges}

    def intercept(request: WireRequest) -> WireResponse | None:
        old = any(charge.task_id in request.url for charge in simulator.charges if charge.prompt in gone)
        return response(404, body=b"gone") if "/files/" in request.url and old else None

    async with batch_of(simulator, tmp_path, intercept, retry=QUICK) as batch:
        outcomes = await run(batch, ROWS, max_in_flight=8)
    assert {prompt for prompt, outcome in outcomes.items() if type(outcome).__name__ == "Failed"} == gone
    assert kinds(outcomes).count("Succeeded") == 24 - len(gone)


async def test_a2_a_few_broken_images_do_not_stop_a_run(tmp_path: Path) -> None:
    """Three rows in a row have images that are none, and nothing else is in flight whose success could show it."""
    simulator = Simulator(FAST_PROFILE)
    broken = {"fox 2", "fox 3", "fox 4"}

    def intercept(request: WireRequest) -> WireResponse | None:
        is_broken = any(charge.task_id in request.url for charge in simulator.charges if charge.prompt in broken)
        return response(200, body=b"<svg/>") if "/files/" in request.url and is_broken else None

    async with batch_of(simulator, tmp_path, intercept, retry=QUICK) as batch:
        began_s = anyio.current_time()
        outcomes = await run(batch, ROWS, max_in_flight=1)
        assert anyio.current_time() - began_s < 120
    assert {prompt for prompt, outcome in outcomes.items() if type(outcome).__name__ == "Failed"} == broken
    assert len(simulator.charges) == 24
