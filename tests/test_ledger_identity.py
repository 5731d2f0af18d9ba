"""One holder per ledger, and no ledger that knows less than its surroundings (M7, M8, M11)."""

import contextlib
import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from nanobanana_async import LedgerError, Phase, RowState
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.lock import LedgerLock
from nanobanana_async.simulator import FAST_PROFILE, Simulator
from tests.batches import FOXES, batch_of, kinds, nth_post, rows_of, run, run_until_stopped
from tests.fakes import lost

# Files and locks, which know nothing of event loops.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


async def finished_batch(folder: Path, rows: list[str] = FOXES) -> Simulator:
    """Run a batch to its end, and return its service."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, folder) as batch:
        await run(batch, rows)
    return simulator


# --- the lock ---------------------------------------------------------------------------------------------------------


async def test_m7_closing_another_descriptor_of_the_ledger_lets_no_second_run_in(tmp_path: Path) -> None:
    """M7: a backup tool or a web app in the same process drops SQLite's POSIX lock, and not ours."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        shutil.copy(tmp_path / "ledger.db", tmp_path / "backup.db")
        (tmp_path / "ledger.lock").read_bytes()
        code = (
            "import sys, anyio\nfrom pathlib import Path\n"
            "from nanobanana_async.ledger.batch_ledger import BatchLedger\n"
            "anyio.run(BatchLedger.open, Path(sys.argv[1]))"
        )
        refused = await anyio.run_process([sys.executable, "-c", code, str(tmp_path)], check=False)
        assert f"in use by process {os.getpid()}" in refused.stderr.decode()
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
    assert len(simulator.charges) == len(FOXES)


async def test_m7_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M7: where every lock is granted (NFS nolock, some FUSE), the ledger may be elsewhere."""
    with monkeypatch.context() as patch:
        patch.setattr("nanobanana_async.ledger.lock.fcntl.flock", lambda *_: None)
        with pytest.raises(LedgerError, match=r"does not lock files.*pass --ledger DIR"):
            await BatchLedger.open(tmp_path)
    ledger = await BatchLedger.open(tmp_path / "share", ledger_folder=tmp_path / "local")
    await ledger.aclose()
    assert (tmp_path / "local" / "ledger.db").exists()
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["ledger.location"]


async def test_m7_a_lock_of_another_machine_is_respected_for_a_minute(tmp_path: Path) -> None:
    """M7: a lock may not reach across machines. A ledger that was closed is free at once."""
    await (await BatchLedger.open(tmp_path)).aclose()
    lock = tmp_path / "ledger.lock"
    record = json.loads(lock.read_text())
    assert record["pid"] is None
    lock.write_text(json.dumps({**record, "pid": 7, "host": "elsewhere", "machine": "other"}))
    with pytest.raises(LedgerError, match=r"in use by process 7 on elsewhere, or was \d s ago") as caught:
        await BatchLedger.open(tmp_path)
    assert caught.value.pid == 7
    minutes_ago_s = time.time() - 61
    os.utime(lock, (minutes_ago_s, minutes_ago_s))
    await (await BatchLedger.open(tmp_path)).aclose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_m7_a_forked_child_does_not_keep_the_lock(tmp_path: Path, anyio_backend: str) -> None:
    """M7: a worker process that outlives its parent does not block the folder."""
    lock = LedgerLock(tmp_path / "ledger.lock")
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready_write, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(ready_read, 1)
    lock.close()
    LedgerLock(tmp_path / "ledger.lock").close()
    os.kill(child, 9)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(lambda folder: (folder / "ledger.lock").unlink(), id="removed"),
        pytest.param(lambda folder: replaced(folder / "ledger.lock"), id="replaced"),
        pytest.param(lambda folder: (folder / "ledger.lock").write_text('{"run": 99}'), id="another-run"),
    ],
)
async def test_m7_every_transaction_checks_that_the_run_still_holds_the_ledger(
    tmp_path: Path, tamper: Callable[[Path], object]
) -> None:
    """M7: a run that was pushed aside writes and submits nothing more."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        tamper(tmp_path)
        _, cause = await run_until_stopped(batch)
    assert isinstance(cause, LedgerError)
    assert simulator.charges == []


def replaced(path: Path) -> None:
    """Replace a file by an equal one."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


# --- restored, copied, damaged --------------------------------------------------------------------------------------


def restore(folder: Path, backup: bytes) -> None:
    """Restore the database as `cp` over the same inode does."""
    (folder / "ledger.db-wal").unlink(missing_ok=True)
    with (folder / "ledger.db").open("r+b") as file:
        file.truncate()
        file.write(backup)


@pytest.mark.parametrize("lost_files", ["nothing else", "the lock", "the manifest", "both"])
async def test_m8_a_ledger_restored_from_a_backup_stops_the_run(tmp_path: Path, lost_files: str) -> None:
    """M8: the lock file, the manifest or the images know more. What was lost becomes unknown, or is bound."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch, FOXES[:4])
    backup = (tmp_path / "ledger.db").read_bytes()
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    restore(tmp_path, backup)
    for name, kinds_of_loss in (("ledger.lock", ("the lock", "both")), ("manifest.jsonl", ("the manifest", "both"))):
        if lost_files in kinds_of_loss:
            (tmp_path / name).unlink()
    with pytest.raises(LedgerError, match=r"Running it could charge rows twice.*resolve adopt --out"):
        await BatchLedger.open(tmp_path)
    await (await BatchLedger.open(tmp_path, adopt=True)).aclose()
    async with batch_of(simulator, tmp_path) as batch:
        outcomes = await run(batch)
    assert len(simulator.charges) == len(FOXES)
    assert set(kinds(outcomes)) <= {"Succeeded", "Unknown"}


async def test_m8_after_an_adoption_new_rows_are_unknown(tmp_path: Path) -> None:
    """M8: nothing tells which rows were lost, so none is charged again without a decision about it."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch, FOXES[:4])
    backup = (tmp_path / "ledger.db").read_bytes()
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch)
    restore(tmp_path, backup)
    (tmp_path / "manifest.jsonl").unlink()
    for image in tmp_path.glob("*.png"):
        image.unlink()
    await (await BatchLedger.open(tmp_path, adopt=True)).aclose()
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, FOXES[:6])).count("Unknown") == 2
        for row in await batch.unknown_rows():
            await batch.abandon(row.key)
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch)).count("Unknown") == 6
    assert len(simulator.charges) == len(FOXES)


@pytest.mark.slow
@pytest.mark.parametrize("lost_lock", [False, True])
async def test_m8_rows_that_were_rejected_before_a_backup_are_unknown_after_it(
    tmp_path: Path, *, lost_lock: bool
) -> None:
    """M8: such a row may have been charged since, whether or not the lock file is left to tell."""
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path, nth_post(lambda _: lost(Phase.CONNECT))) as batch:
        await run_until_stopped(batch, ["fox"])
    backup, manifest = (tmp_path / "ledger.db").read_bytes(), (tmp_path / "manifest.jsonl").read_bytes()
    async with batch_of(simulator, tmp_path) as batch:
        await run(batch, ["fox"])
    restore(tmp_path, backup)
    (tmp_path / "manifest.jsonl").write_bytes(manifest)
    (tmp_path / "0001-fox.png").unlink()
    if lost_lock:
        (tmp_path / "ledger.lock").unlink()
    with pytest.raises(LedgerError):
        await BatchLedger.open(tmp_path)
    await (await BatchLedger.open(tmp_path, adopt=True)).aclose()
    async with batch_of(simulator, tmp_path) as batch:
        assert kinds(await run(batch, ["fox"])) == ["Unknown"]
    assert len(simulator.charges) == 1


async def test_m8_one_adoption_is_enough_whatever_the_manifest_has(tmp_path: Path) -> None:
    """M8: the manifest may know several attempts of a row that the ledger does not, and lines of another program."""
    await finished_batch(tmp_path, ["fox"])
    manifest = tmp_path / "manifest.jsonl"
    (line,) = (json.loads(text) for text in manifest.read_text().splitlines())
    known = [{**line, "key": "other", "attempt": 3, "task_id": None, "state": "unknown"}]
    odd = [
        {**line, "key": None},
        {**line, "attempt": 10**30},
        {**line, "key": "\udce9"},
        {**line, "prompt": ""},
        [1],
        7,
    ]
    lines = [json.dumps(value) for value in [line, *known, *odd, [1], 7]]
    manifest.write_bytes("\n".join([*lines, "[" * 200_000, ""]).encode() + b"\xff\xfe\n")
    with pytest.raises(LedgerError, match=r"lacks rows that manifest\.jsonl contains"):
        await BatchLedger.open(tmp_path)
    await (await BatchLedger.open(tmp_path, adopt=True)).aclose()
    ledger = await BatchLedger.open(tmp_path)
    rows = await ledger.list_rows()
    await ledger.aclose()
    assert [(row.state, row.attempt) for row in rows] == [(RowState.SAVED, 1), (RowState.UNKNOWN, 3)]


@pytest.mark.parametrize(
    "content", ['{"commits": "7"}', '{"run": null}', '{"run": -1}', "[" * 5000, "", "\0" * 9, '{"x": 1}']
)
async def test_m8_a_lock_file_that_cannot_be_read_is_one_that_is_missing(tmp_path: Path, content: str) -> None:
    """M8: the ledger is refused until it is adopted."""
    await finished_batch(tmp_path, ["fox"])
    (tmp_path / "ledger.lock").write_text(content)
    with pytest.raises(LedgerError, match="is a copy of another ledger"):
        await BatchLedger.open(tmp_path)
    await (await BatchLedger.open(tmp_path, adopt=True)).aclose()
    await (await BatchLedger.open(tmp_path)).aclose()


@pytest.mark.parametrize(
    "sql", ["DELETE FROM meta WHERE name = 'run'", "UPDATE meta SET value = 'x' WHERE name = 'commits'"]
)
async def test_m8_values_of_another_program_are_damage(tmp_path: Path, sql: str) -> None:
    """M8: an error says so, and no traceback."""
    await finished_batch(tmp_path, ["fox"])
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as database:
        database.execute(sql)
        database.commit()
    with pytest.raises(LedgerError, match=r"is damaged|cannot be used"):
        await BatchLedger.open(tmp_path)


async def test_m7_one_folder_has_one_ledger(tmp_path: Path) -> None:
    """M7: a second ledger elsewhere would charge the rows of the first one again."""
    out, away = tmp_path / "out", tmp_path / "away"
    await (await BatchLedger.open(out, ledger_folder=away)).aclose()
    with pytest.raises(LedgerError, match=r"its ledger is in .*away, got .* Pass --ledger"):
        await BatchLedger.open(out, ledger_folder=tmp_path / "elsewhere")
    for known in (away, None):
        await (await BatchLedger.open(out, ledger_folder=known, create=False)).aclose()
    assert not (out / "ledger.db").exists()
    (out / "ledger.location").write_text("")
    with pytest.raises(LedgerError, match=r"ledger\.location: expected the path"):
        await BatchLedger.open(out)
    await (await BatchLedger.open(tmp_path / "plain")).aclose()
    with pytest.raises(LedgerError, match="its ledger is in"):
        await BatchLedger.open(tmp_path / "plain", ledger_folder=away)


@pytest.mark.parametrize("spoil", ["removed", "a bit flipped"])
async def test_m8_a_damaged_write_ahead_log_stops_the_run(tmp_path: Path, spoil: str) -> None:
    """M8: after kill -9 the log has the last commits, and SQLite ignores what it cannot read."""
    folder, killed = tmp_path / "run", tmp_path / "killed"
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, folder) as batch:
        await run(batch)
        killed.mkdir()
        for path in folder.iterdir():  # as the disk is at a kill, with the same identity
            shutil.copy(path, killed / path.name)
    for path in killed.iterdir():
        with (folder / path.name).open("r+b" if (folder / path.name).exists() else "w+b") as file:
            file.truncate()
            file.write(path.read_bytes())
    (folder / "manifest.jsonl").unlink(missing_ok=True)
    for image in folder.glob("*.png"):
        image.unlink()
    wal = folder / "ledger.db-wal"
    if spoil == "removed":
        wal.unlink()
    else:
        data = bytearray(wal.read_bytes())
        data[len(data) // 2] ^= 1
        wal.write_bytes(data)
    with pytest.raises(LedgerError, match=r"lacks its last \d+ writes|missing or empty"):
        await BatchLedger.open(folder)
    assert len(simulator.charges) == len(FOXES)


@pytest.mark.parametrize("how", ["cp -r", "hard link", "database only"])
async def test_m8_a_copy_is_refused(tmp_path: Path, how: str) -> None:
    """M8: both could charge the same rows."""
    await finished_batch(tmp_path / "run", FOXES[:4])
    copy = tmp_path / "copy"
    if how == "cp -r":
        shutil.copytree(tmp_path / "run", copy)
    else:
        copy.mkdir()
        if how == "hard link":
            (copy / "ledger.db").hardlink_to(tmp_path / "run" / "ledger.db")
        else:
            shutil.copy(tmp_path / "run" / "ledger.db", copy)
    with pytest.raises(LedgerError, match="is a copy of another ledger"):
        await BatchLedger.open(copy)


async def test_m8_an_image_without_a_submit_stops_the_run(tmp_path: Path) -> None:
    """M8: a new ledger beside old images has lost something."""
    await finished_batch(tmp_path, ["fox"])
    for name in ("ledger.db", "ledger.lock", "manifest.jsonl"):
        (tmp_path / name).unlink()
    simulator = Simulator(FAST_PROFILE, seed=1)
    async with batch_of(simulator, tmp_path) as batch:
        _, cause = await run_until_stopped(batch, ["fox"])
    assert "the image 0001-fox exists, and the ledger has no submit of it" in str(cause)
    assert simulator.charges == []


async def test_m8_an_interrupted_run_needs_no_adoption(tmp_path: Path) -> None:
    """Nothing is lost by a kill, so nothing has to be decided but the rows in flight."""
    ledger = await BatchLedger.open(tmp_path)
    ledger._db.close()  # noqa: SLF001 - as after a kill, which writes and releases nothing in order
    ledger._opened.lock.close()  # noqa: SLF001 - the kernel does this
    with contextlib.suppress(sqlite3.Error):
        await ledger.aclose()
    async with batch_of(Simulator(FAST_PROFILE), tmp_path) as batch:
        assert kinds(await run(batch)) == ["Succeeded"] * len(FOXES)
        assert all(row.state is RowState.SAVED for row in await rows_of(batch))


async def test_m8_a_kill_right_after_the_first_opening_needs_no_adoption(tmp_path: Path) -> None:
    """Without an attempt, nothing can be lost."""
    await (await BatchLedger.open(tmp_path)).aclose()
    (tmp_path / "ledger.lock").write_text("")
    await (await BatchLedger.open(tmp_path)).aclose()


# --- the disk ---------------------------------------------------------------------------------------------------------


class FailingConnection(sqlite3.Connection):
    """A connection whose nth COMMIT fails, as with an fsync that failed."""

    commits_left = 10**9
    syncs = 0

    def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:  # noqa: ANN401 - passed on
        """Fail once."""
        if sql == "COMMIT":
            FailingConnection.syncs += 1
            FailingConnection.commits_left -= 1
            if FailingConnection.commits_left == 0:
                raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *rest)


async def test_m11_one_failed_commit_breaks_the_ledger_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M11: the second fsync after a failed one would succeed, and prove nothing. Nothing more is submitted."""
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **options: connect(*args, factory=FailingConnection, **options)
    )
    simulator = Simulator(FAST_PROFILE)
    async with batch_of(simulator, tmp_path) as batch:
        FailingConnection.commits_left, FailingConnection.syncs = 12, 0
        _, cause = await run_until_stopped(batch, max_in_flight=2)
        syncs, charged = FailingConnection.syncs, len(simulator.charges)
    assert isinstance(cause, LedgerError)
    assert "disk I/O error. Nothing more is submitted" in str(cause)
    assert (syncs, FailingConnection.syncs) == (12, 12)
    assert charged == len(simulator.charges) < len(FOXES)
