"""Budgets of owners: what counts, across tasks, restarts and processes."""

from decimal import Decimal
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from nanobanana_async import (
    BudgetExceeded,
    LedgerError,
    NanoBananaClient,
    OwnerLimits,
    SubmissionUnknown,
    WireRequest,
    WireResponse,
)
from nanobanana_async.ledger.lock import exclusive
from nanobanana_async.simulator import Simulator
from tests.batches import nth_post
from tests.fakes import lost, rejected
from tests.ledgers import client_of, rows

pytestmark = pytest.mark.anyio


async def test_an_owner_cannot_spend_more_than_its_budget(tmp_path: Path) -> None:
    """Neither finished nor running tasks of an owner leave room that is not there. Others are not affected."""
    simulator = Simulator()
    limits = OwnerLimits(budget=Decimal("1.2"))
    async with client_of(simulator, tmp_path, owner_limits=limits) as client:
        await client.generate("a fox", owner="x")
        await client.submit("a hare", owner="x")
        with pytest.raises(BudgetExceeded, match=r"0\.5 credits spent, 0\.5 reserved, and one more may cost 0\.5"):
            await client.submit("an owl", owner="x")
        await client.generate("an owl", owner="y")
        await client.generate("an owl")
    assert len(simulator.charges) == 4


async def test_while_no_price_is_known_an_owner_has_one_submit(tmp_path: Path) -> None:
    """Two of unknown price could cost more than the budget. A stated price allows more."""
    for limits, allowed in (
        (OwnerLimits(budget=Decimal(2)), 1),
        (OwnerLimits(budget=Decimal(2), max_price=Decimal(1)), 2),
    ):
        simulator = Simulator()
        async with client_of(simulator, tmp_path / str(allowed), owner_limits=limits) as client:
            for _ in range(allowed):
                await client.submit("a fox", owner="x")
            with pytest.raises(BudgetExceeded):
                await client.submit("a hare", owner="x")
        assert len(simulator.charges) == allowed


async def test_processes_share_the_budget_of_an_owner(tmp_path: Path) -> None:
    """Any number of workers that submit at once do not exceed it."""
    simulator = Simulator()
    limits = OwnerLimits(budget=Decimal(5), max_price=Decimal("0.5"))
    async with (
        client_of(simulator, tmp_path, owner_limits=limits) as one,
        client_of(simulator, tmp_path, owner_limits=limits) as two,
        client_of(simulator, tmp_path, owner_limits=limits) as three,
    ):
        refused: list[BudgetExceeded] = []

        async def submit(client: NanoBananaClient) -> None:
            try:
                await client.submit("a fox", owner="x")
            except BudgetExceeded as exc:
                refused.append(exc)

        async with anyio.create_task_group() as group:
            for _ in range(8):
                for client in (one, two, three):
                    group.start_soon(submit, client)
    assert (len(simulator.charges), len(refused)) == (10, 14)


async def test_what_may_have_been_charged_counts_against_the_budget_after_a_restart(tmp_path: Path) -> None:
    """A crash gives no credit."""
    simulator = Simulator()
    limits = OwnerLimits(budget=Decimal(1), max_price=Decimal(1))
    async with client_of(simulator, tmp_path, nth_post(lambda _: lost()), owner_limits=limits) as client:
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", owner="x")
    async with client_of(simulator, tmp_path, owner_limits=limits) as client:
        with pytest.raises(BudgetExceeded):
            await client.submit("a hare", owner="x")


async def test_a_resubmit_that_the_budget_does_not_allow_is_not_sent(tmp_path: Path) -> None:
    """The first attempt may have been charged, and its error is raised."""
    simulator = Simulator()
    limits = OwnerLimits(budget=Decimal(1), max_price=Decimal(1))
    posts = 0

    def fail(request: WireRequest) -> WireResponse | None:
        nonlocal posts
        posts += request.method == "POST"
        return rejected(500) if request.method == "POST" else None

    async with client_of(simulator, tmp_path, fail, owner_limits=limits) as client:
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox", owner="x")
    assert posts == 1


async def test_a_file_that_cannot_be_read_refuses_submits_with_a_budget_and_breaks_nothing(tmp_path: Path) -> None:
    """It is the file of another process. Once it can be read again, submits go on."""
    limits = OwnerLimits(budget=Decimal(5), max_price=Decimal(1))
    simulator = Simulator()
    async with client_of(simulator, tmp_path, owner_limits=limits) as client:
        handle = await client.submit("a fox", owner="x")
        other = tmp_path / "tasks-002.db"
        other.mkdir()
        with pytest.raises(LedgerError, match=r"tasks-002\.db cannot be read"):
            await client.submit("a hare", owner="x")
        await handle.result()
        await handle.ack()
        other.rmdir()
        await client.submit("an owl", owner="x")
    assert len(simulator.charges) == 2


async def test_a_busy_budget_lock_delays_checked_submits_only(tmp_path: Path) -> None:
    """Ids and ends of other tasks are recorded meanwhile."""
    limits = {"x": OwnerLimits(budget=Decimal(5), max_price=Decimal(1)), "y": OwnerLimits()}
    async with client_of(Simulator(), tmp_path, owner_limits=limits.__getitem__) as client:
        waiting = anyio.Event()

        async def submit() -> None:
            await client.submit("a fox", owner="x")
            waiting.set()

        async with anyio.create_task_group() as group:
            with exclusive(tmp_path / "budget.lock"):
                handle = await client.submit("a hare", owner="y")
                group.start_soon(submit)
                with anyio.move_on_after(0.2):
                    await waiting.wait()
                assert not waiting.is_set()
                assert [row["task_id"] for row in rows(tmp_path)] == [handle.task_id]
            with anyio.fail_after(5):
                await waiting.wait()
