"""No sequence of outcomes, responses and crashes makes a batch spend more than it may, or charge more than it says."""

import tempfile
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Literal

import anyio
import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanobanana_async import Batch, GenerationRequest, LedgerRow, NanoBananaError
from nanobanana_async.simulator import Simulator, SimulatorProfile
from tests.batches import batch_of, rows_of

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.virtual_time,
    pytest.mark.usefixtures("no_threads"),
    pytest.mark.other_clients,  # the examples share seeds, and so ids
]

PRICES = {"1k": Decimal("0.1"), "4k": Decimal("1.2")}
DEAREST = max(PRICES.values())
ROWS = [GenerationRequest(f"fox {number}", image_size=("1k", "4k")[number % 2]) for number in range(16)]
LONGEST_S = 20_000.0
MEMORY = next((path for path in ("/dev/shm",) if Path(path).is_dir()), None)  # noqa: S108 - a sync costs nothing there

rates = st.sampled_from([0.0, 0.2, 0.5])


@st.composite
def profiles(draw: st.DrawFn) -> SimulatorProfile:
    """Return a service with any mix of outcomes and responses."""
    charge: Literal["null", "missing", "zero", "price"] = draw(
        st.sampled_from(["null", "missing", "zero", "zero", "price"])
    )
    return SimulatorProfile(
        median_s=5,
        visibility_delay_s=0,
        size_prices=PRICES,
        failed_charge=charge,
        failed_tasks=draw(rates),
        text_only=draw(rates) / 2,
        unstated_charges=draw(rates),
        server_errors=draw(rates) / 4,
        rate_limited=draw(rates) / 4,
        lost_responses=draw(rates) / 4,
        charged_errors=draw(rates) / 2,
        charged_timeouts=draw(rates) / 2,
        captive_portals=draw(rates) / 4,
    )


@attrs.frozen
class Run:
    """One run of the batch."""

    crash_after_s: float | None
    """When its writes begin to fail, as at a kill; None if it comes to its end."""
    stop_after_s: float | None
    """When it is interrupted; None if it is not."""
    retry_failed: bool
    resubmits: bool
    """Whether the user submits unknown rows again afterwards."""


moments = st.none() | st.floats(0.0, 60.0)
runs = st.lists(st.builds(Run, moments, moments, st.booleans(), st.booleans()), min_size=1, max_size=2)


async def play(batch: Batch, run: Run) -> None:
    """Run all rows, with a crash and an interrupt if they are planned."""

    async def crash() -> None:
        await anyio.sleep(run.crash_after_s or 0.0)
        batch._ledger._failure = "the process was killed"  # noqa: SLF001 - nothing is durable from now on

    async with anyio.create_task_group() as group:
        if run.crash_after_s is not None:
            group.start_soon(crash)
        with anyio.move_on_after(run.stop_after_s or LONGEST_S):
            try:
                async for _ in batch.run(ROWS, retry_failed=run.retry_failed):
                    pass
            except NanoBananaError:
                pass
        group.cancel_scope.cancel()


async def rows_after(folder: Path, simulator: Simulator, plan: list[Run], budget: Decimal | None) -> list[LedgerRow]:
    """Play all runs on one folder, and return its rows."""
    for run in plan:
        async with batch_of(simulator, folder, budget=budget) as batch:
            await play(batch, run)
        async with batch_of(simulator, folder) as batch:
            for row in await batch.unknown_rows() if run.resubmits else []:
                await batch.resubmit(row.key)
    async with batch_of(simulator, folder) as batch:
        return await rows_of(batch)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(profile=profiles(), plan=runs, seed=st.integers(0, 2**16), budget=st.decimals(Decimal("0.1"), 6, places=1))
async def test_charges_exceed_the_budget_by_at_most_one_price(
    profile: SimulatorProfile, plan: list[Run], seed: int, budget: Decimal
) -> None:
    """The property (i): with constant prices, by that of the dearest model and size."""
    simulator = Simulator(profile, seed=seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        await rows_after(Path(folder), simulator, plan, budget)
    assert sum(charge.credits for charge in simulator.charges) <= budget + DEAREST


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(profile=profiles(), plan=runs, seed=st.integers(0, 2**16))
async def test_charges_beyond_the_possible_duplicates_never_exceed_one_per_key(
    profile: SimulatorProfile, plan: list[Run], seed: int
) -> None:
    """The property (ii): whatever was charged twice is in the ledger, and so in manifest and summary."""
    simulator = Simulator(profile, seed=seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        rows = await rows_after(Path(folder), simulator, plan, None)
    charged = Counter(charge.prompt for charge in simulator.charges if charge.credits)
    excess = {row.prompt: charged[row.prompt] - row.possible_duplicates for row in rows}
    assert max(excess.values(), default=0) <= 1
    assert set(charged) <= set(excess)
