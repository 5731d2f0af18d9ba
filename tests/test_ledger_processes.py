"""A ledger that several processes and clients share: who holds what, and when it is closed."""

import asyncio
import sqlite3
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from nanobanana_async import (
    ClientClosed,
    LedgerError,
    NanoBananaClient,
    NanoBananaError,
    SqliteLedger,
    WireRequest,
)
from nanobanana_async.ledger.task_file import TaskFile
from nanobanana_async.simulator import FAST_POLLING, Simulator
from tests.ledgers import client_of, resumed

pytestmark = pytest.mark.anyio


async def test_processes_write_into_files_of_their_own_and_spending_sums_them(tmp_path: Path) -> None:
    """Two workers share a folder, and neither is given the tasks of the other."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as one, client_of(simulator, tmp_path) as other:
        first = await one.submit("a fox", owner="x")
        second = await other.submit("a hare", owner="x")
        await first.result()
        assert [handle.task_id for handle in await resumed(one)] == [first.task_id]
        assert [handle.task_id for handle in await resumed(other)] == [second.task_id]
        assert await one.spending("x") == await other.spending("x")
        spending = await other.spending("x")
        assert (spending.spent, spending.reserved) == (Decimal("0.5"), Decimal("0.5"))
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["tasks-001.db", "tasks-002.db"]


async def test_files_without_a_process_are_taken_over_and_released_once_acknowledged(tmp_path: Path) -> None:
    """The tasks of a worker that has ended go to one that has not, and its file is free again."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as one:
        await one.spending()  # opens the first file
        async with client_of(simulator, tmp_path) as ended:
            task = await ended.submit("a fox")
        await one.spending()  # looks for files without a process, as one does every 30 s
        (handle,) = await resumed(one)
        assert handle.task_id == task.task_id
        async with client_of(simulator, tmp_path) as third:
            assert await resumed(third) == []
            await handle.ack()
            await one.spending()
            assert (tmp_path / "tasks-003.db").exists()
        async with client_of(simulator, tmp_path):
            assert len(list(tmp_path.glob("*.db"))) == 3  # the second file is used again


async def test_follow_yields_what_is_taken_over_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finishes the tasks of another one without a restart."""
    monkeypatch.setattr("nanobanana_async.ledger.folder.TAKE_OVER_INTERVAL_S", 0.05)
    simulator = Simulator()
    seen: list[str] = []
    async with client_of(simulator, tmp_path) as survivor:
        mine = await survivor.submit("a fox")

        async def follow() -> None:
            async for handle in survivor.resume(follow=True):
                seen.append(handle.task_id)  # noqa: PERF401 - it never ends

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            async with client_of(simulator, tmp_path) as ended:
                theirs = await ended.submit("a hare")
            await survivor.submit("an owl")
            with anyio.fail_after(10):
                while len(seen) < 2:
                    await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert seen == [mine.task_id, theirs.task_id]


@pytest.mark.parametrize("damage", ["garbage", "newer"])
async def test_a_damaged_file_is_reported_and_not_replaced(tmp_path: Path, damage: str) -> None:
    """It may have charged tasks."""
    async with client_of(Simulator(), tmp_path) as client:
        await client.submit("a fox")
    path = tmp_path / "tasks-001.db"
    if damage == "garbage":
        path.write_bytes(b"x" * 8192)
    else:
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version=99")
        db.close()
    with pytest.raises(LedgerError, match=r"To go on without its tasks, move tasks-001\.db and tasks-001\.lock"):
        async with client_of(Simulator(), tmp_path):
            pass
    assert path.exists()


async def test_a_restored_file_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No task is submitted twice from it, so it does no harm."""
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as client:
        await client.submit("a fox")
    backup = (tmp_path / "tasks-001.db").read_bytes()
    async with client_of(simulator, tmp_path) as client:
        await client.submit("a hare")
    (tmp_path / "tasks-001.db").write_bytes(backup)
    async with client_of(simulator, tmp_path) as client:
        assert len(await resumed(client)) == 1
    assert "lacks its last" in caplog.text


async def test_spending_beside_the_take_over_of_other_files_harms_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look for files without a process, and release them."""
    monkeypatch.setattr("nanobanana_async.ledger.folder.TAKE_OVER_INTERVAL_S", 0.01)
    simulator = Simulator()
    async with client_of(simulator, tmp_path) as client:
        await client.spending()
        for _ in range(10):
            async with client_of(simulator, tmp_path) as ended:
                await (await ended.submit("a fox")).ack()
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(client.spending)
        await client.generate("a hare")


async def test_a_ledger_is_closed_by_the_last_of_the_clients_that_share_it(tmp_path: Path) -> None:
    """The first one that closes does not take it from the other."""
    ledger = SqliteLedger(tmp_path)
    simulator = Simulator()
    one = NanoBananaClient("dk-test", transport=simulator, polling=FAST_POLLING, ledger=ledger)
    other = NanoBananaClient("dk-test", transport=simulator, polling=FAST_POLLING, ledger=ledger)
    await one.submit("a fox")
    await other.submit("a hare")
    await one.aclose()
    await other.generate("an owl")
    await other.aclose()
    third = NanoBananaClient("dk-test", transport=simulator, ledger=ledger)
    with pytest.raises(LedgerError, match="was closed"):
        await third.submit("a cat")
    await third.aclose()


async def test_following_ends_when_the_client_is_closed(tmp_path: Path) -> None:
    """A task that follows does not hang."""
    client = NanoBananaClient("dk-test", transport=Simulator(), ledger=SqliteLedger(tmp_path))
    await client.spending()

    async def follow() -> None:
        with pytest.raises(ClientClosed):
            async for _ in client.resume(follow=True):
                pass

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            await anyio.sleep(0.05)
            await client.aclose()


async def test_a_client_that_closes_while_an_attempt_is_recorded_leaves_it_not_charged(tmp_path: Path) -> None:
    """Nothing was sent, so nothing is unresolved."""
    simulator = Simulator()
    for steps in range(12):
        client = NanoBananaClient("dk-test", transport=simulator, ledger=SqliteLedger(tmp_path))

        async def submit(client: NanoBananaClient = client) -> None:
            with suppress(NanoBananaError):
                await client.submit("a fox")

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            await anyio.sleep(0.002 * steps)
            await client.aclose()
    async with client_of(simulator, tmp_path) as client:
        assert [attempt async for attempt in client.unresolved()] == []
        assert {handle.task_id for handle in await resumed(client)} == {charge.task_id for charge in simulator.charges}


async def test_an_id_that_cannot_be_recorded_is_an_orphan_if_its_caller_is_gone(tmp_path: Path) -> None:
    """The hook is the last place for it."""
    simulator = Simulator(delay_s=0.1)
    orphans: list[str] = []

    def break_disk(request: WireRequest) -> None:
        if request.method == "POST":
            (tmp_path / "tasks-001.db").rename(tmp_path / "moved")

    hook = orphans.append
    async with client_of(simulator, tmp_path, break_disk, on_orphan=lambda handle: hook(handle.task_id)) as client:
        with anyio.move_on_after(0.08):
            await client.submit("a fox")
        await anyio.sleep(0.3)
    assert orphans == [charge.task_id for charge in simulator.charges]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_opening_that_is_cancelled_at_any_step_leaves_no_file_open(tmp_path: Path) -> None:
    """Its thread may still run then, and closes what it has opened."""
    for steps in range(40):
        ledger = SqliteLedger(tmp_path)
        task = asyncio.create_task(ledger.open())
        for _ in range(steps):
            await asyncio.sleep(0.0005)
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            assert ledger._files == []  # noqa: SLF001 - a file that stays open is not seen otherwise
        else:
            await ledger.aclose()
    for path in tmp_path.glob("*.db"):
        with anyio.fail_after(10):
            while True:  # until the thread has closed it
                try:
                    file = await TaskFile.open_file(path, 0)
                    break
                except LedgerError:
                    await anyio.sleep(0.01)
        await file.aclose()
