"""The ledger of a batch: durability, locking, and what it rejects."""

import asyncio
import contextlib
import gc
import math
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import anyio
import pytest

from nanobanana_async import (
    AttemptEnd,
    BatchRow,
    GeneratedImage,
    GenerationRequest,
    InvalidRequest,
    LedgerError,
    LedgerRow,
    NanoBananaError,
    NotSent,
    ReasonKind,
    RowState,
    SavedImage,
    SubmissionUnknown,
    Task,
    TaskStatus,
    Verdict,
)
from nanobanana_async.batch.rows import RowKeys
from nanobanana_async.ledger.batch_ledger import BatchLedger

pytestmark = pytest.mark.anyio


def row(key: str = "k", prompt: str = "a fox", name: str | None = None) -> BatchRow:
    """Return a row."""
    return RowKeys().row(GenerationRequest(prompt), key=key, name=name)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Disable the garbage collector, so that nothing is closed by chance."""
    gc.disable()
    yield
    gc.enable()


@asynccontextmanager
async def opened(folder: Path, group_commit_s: float = 0, *, adopt: bool = False) -> AsyncIterator[BatchLedger]:
    """Open a ledger during the block."""
    ledger = await BatchLedger.open(folder, group_commit_s=group_commit_s, adopt=adopt)
    try:
        yield ledger
    finally:
        await ledger.aclose()


def ended(verdict: Verdict, error: NanoBananaError | None = None, task_id: str = "ta-1") -> AttemptEnd:
    """Return the end of an attempt."""
    if verdict is Verdict.ACCEPTED:
        return AttemptEnd(verdict=verdict, rule="task id", task_id=task_id)
    return AttemptEnd(verdict=verdict, rule="r", error=error or ERRORS[verdict])


ERRORS: dict[Verdict, NanoBananaError] = {
    Verdict.REJECTED: InvalidRequest("no"),
    Verdict.NOT_CHARGED: NotSent("not sent"),
    Verdict.UNKNOWN: SubmissionUnknown("unknown"),
}


async def record_of(ledger: BatchLedger, key: str = "k") -> LedgerRow:
    """Return one ledger row."""
    return next(record for record in await ledger.list_rows() if record.key == key)


async def test_a_row_goes_from_submitting_to_saved(tmp_path: Path) -> None:
    """Each step is present when the ledger is opened again."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        record = await record_of(ledger)
        assert (record.state, record.number, record.file_stem) == (RowState.READY, 1, "0001-a-fox")
        await ledger.begin_attempt("k")
        await ledger.transition("k", RowState.SUBMITTED, task_id="ta-1", submitted_at=1.0)
        await ledger.transition("k", RowState.SUCCEEDED, consumed="0.50", ended_at=2.0)
    async with opened(tmp_path) as ledger:
        record = await record_of(ledger)
        assert (record.state, record.task_id, str(record.consumed)) == (RowState.SUCCEEDED, "ta-1", "0.50")
        await ledger.record_saved("k", [SavedImage(path=tmp_path / "0001-a-fox.png", sha256="ab", size_bytes=3)])
    async with opened(tmp_path) as ledger:
        record = await record_of(ledger)
        assert record.state is RowState.SAVED
        assert record.files == (SavedImage(path=tmp_path / "0001-a-fox.png", sha256="ab", size_bytes=3),)


async def test_a_charged_row_whose_next_attempt_was_not_charged_is_not_ready(tmp_path: Path) -> None:
    """The program may end now. The row has the end that was charged, and the next run does not charge it again."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        await ledger.end_attempt("k", ended(Verdict.ACCEPTED))
        await ledger.record_final("k", Task(task_id="ta-1", status=TaskStatus.SUCCESS), ReasonKind.EMPTY)
        await ledger.begin_attempt("k", is_again=True)
        await ledger.end_attempt("k", ended(Verdict.NOT_CHARGED), is_again=True)
    async with opened(tmp_path) as ledger:
        record = await record_of(ledger)
        assert (record.state, record.task_id, record.reason_kind) == (RowState.FAILED, "ta-1", ReasonKind.EMPTY)
        await ledger.begin_attempt("k")
        assert (await record_of(ledger)).attempt == 3, "no number is used twice"


async def test_a_saved_image_survives_an_attempt_that_has_none(tmp_path: Path) -> None:
    """Whether it failed, was not charged, or is unknown and given up: the row keeps its file."""
    file = SavedImage(path=tmp_path / "0001-a-fox.png", sha256="ab", size_bytes=3)
    done = Task(task_id="ta-1", status=TaskStatus.SUCCESS, images=(GeneratedImage(url="https://a.example/1.png"),))
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        await ledger.end_attempt("k", ended(Verdict.ACCEPTED))
        await ledger.record_final("k", done, None)
        await ledger.record_saved("k", [file])
        for verdict in (Verdict.NOT_CHARGED, Verdict.REJECTED):
            await ledger.begin_attempt("k", is_again=True)
            await ledger.end_attempt("k", ended(verdict), is_again=True)
            assert ((await record_of(ledger)).state, (await record_of(ledger)).files) == (RowState.SAVED, (file,))
        await ledger.begin_attempt("k", is_again=True)
        await ledger.end_attempt("k", ended(Verdict.ACCEPTED, task_id="ta-2"), is_again=True)
    async with opened(tmp_path) as ledger:  # the next run waits for it
        await ledger.record_final("k", Task(task_id="ta-2", status=TaskStatus.FAILED, consumed=Decimal(1)), None)
        record = await record_of(ledger)
        assert (record.state, record.files, record.possible_duplicates) == (RowState.SAVED, (file,), 0)
        await ledger.begin_attempt("k", is_again=True)
        await ledger.end_attempt("k", ended(Verdict.UNKNOWN), is_again=True)
        assert (await record_of(ledger)).state is RowState.UNKNOWN
        await ledger.resolve("k", RowState.ABANDONED)
        assert ((await record_of(ledger)).state, (await record_of(ledger)).files) == (RowState.SAVED, (file,))


async def test_an_interrupted_attempt_is_unknown(tmp_path: Path) -> None:
    """The program ended before a response arrived, so it may be charged."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
    async with opened(tmp_path) as ledger:
        record = await record_of(ledger)
        assert (record.state, record.reason) == (RowState.UNKNOWN, "the program ended before a response arrived")
        with pytest.raises(LedgerError):
            await ledger.begin_attempt("k")


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        pytest.param([], RowState.SUBMITTED, id="no-intent"),
        pytest.param([RowState.REJECTED], RowState.SUBMITTED, id="refused-then-submitted"),
        pytest.param([RowState.SUBMITTED], RowState.REJECTED, id="charged-then-rejected"),
        pytest.param([RowState.SUBMITTED], RowState.SAVED, id="saved-without-an-end"),
        pytest.param([RowState.SUBMITTED], RowState.REQUEUED, id="charged-then-requeued"),
        pytest.param([RowState.SUBMITTED, RowState.SUCCEEDED], RowState.FAILED, id="success-then-failed"),
        pytest.param([RowState.SUBMITTED, RowState.FAILED], RowState.SUCCEEDED, id="failed-then-success"),
        pytest.param(
            [RowState.SUBMITTED, RowState.SUCCEEDED, RowState.SAVED], RowState.UNKNOWN, id="saved-then-unknown"
        ),
        pytest.param([RowState.UNKNOWN, RowState.ABANDONED], RowState.REQUEUED, id="abandoned-then-reopened"),
    ],
)
async def test_a_row_never_goes_back(tmp_path: Path, steps: list[RowState], refused: RowState) -> None:
    """No call makes a charged row ready by mistake."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        if steps:
            await ledger.begin_attempt("k")
        for state in steps:
            await ledger.transition("k", state)
        before = await record_of(ledger)
        with pytest.raises(LedgerError, match="its state does not allow this"):
            await ledger.transition("k", refused)
        assert await record_of(ledger) == before


@pytest.mark.parametrize("state", [RowState.SUBMITTED, RowState.UNKNOWN, RowState.SUBMITTING])
async def test_a_row_that_may_be_charged_is_not_submitted_again(tmp_path: Path, state: RowState) -> None:
    """A second attempt is rejected."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        if state is not RowState.SUBMITTING:
            await ledger.transition("k", state)
        with pytest.raises(LedgerError):
            await ledger.begin_attempt("k")


@pytest.mark.parametrize("verdict", [Verdict.REJECTED, Verdict.NOT_CHARGED, Verdict.UNKNOWN])
async def test_a_requeued_row_gets_a_new_attempt(tmp_path: Path, verdict: Verdict) -> None:
    """The earlier attempt and its possible cost are kept."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        await ledger.end_attempt("k", ended(verdict))
        if verdict is Verdict.UNKNOWN:
            await ledger.resolve("k", RowState.REQUEUED)
        await ledger.begin_attempt("k")
        costs = await ledger.attempt_costs()
        assert {cost.may_be_charged: cost.count for cost in costs} == (
            {True: 2} if verdict is Verdict.UNKNOWN else {False: 1, True: 1}
        )


async def test_a_resubmit_is_an_attempt_of_its_own(tmp_path: Path) -> None:
    """The earlier POST may also have been charged."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        with pytest.raises(LedgerError):
            await ledger.begin_attempt("k", resubmit=True)
        await ledger.end_attempt("k", ended(Verdict.UNKNOWN))
        await ledger.begin_attempt("k", resubmit=True)
        await ledger.end_attempt("k", ended(Verdict.ACCEPTED))
        await ledger.transition("k", RowState.SUCCEEDED, consumed="0.5")
        record = await record_of(ledger)
        assert (record.possible_charges, record.possible_duplicates, record.held_charges) == (2, 1, 1)
        costs = [(cost.may_be_charged, cost.consumed) for cost in await ledger.attempt_costs()]
        assert costs == [(True, None), (True, Decimal("0.5"))]


async def test_a_rejection_after_a_possible_charge_leaves_the_row_unknown(tmp_path: Path) -> None:
    """M6: the attempt that was rejected costs nothing, the one before it may."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        await ledger.end_attempt("k", ended(Verdict.UNKNOWN))
        await ledger.begin_attempt("k", resubmit=True)
        await ledger.end_attempt("k", ended(Verdict.REJECTED, SubmissionUnknown("earlier")))
        record = await record_of(ledger)
        assert (record.state, record.attempt, record.possible_charges) == (RowState.UNKNOWN, 2, 1)


async def test_a_charge_of_zero_is_no_possible_charge(tmp_path: Path) -> None:
    """B4: a failed task whose charge the service states is counted, and one without is held."""
    async with opened(tmp_path) as ledger:
        for key, consumed in (("zero", "0.000000"), ("stated", "0.5"), ("unstated", None)):
            await ledger.upsert_rows([row(key)])
            await ledger.begin_attempt(key)
            await ledger.end_attempt(key, ended(Verdict.ACCEPTED, task_id=key))
            await ledger.transition(key, RowState.FAILED, consumed=consumed)
        charges = [(r.possible_charges, r.held_charges) for r in await ledger.list_rows()]
        assert charges == [(0, 0), (1, 0), (1, 1)]


async def test_file_names_are_derived_and_unique(tmp_path: Path) -> None:
    """File names come from the prompt or the row's name, and are unique without regard to case."""
    rows = [
        row("1", "../../etc/passwd"),
        row("2", "日本"),
        row("3", "x" * 500),
        row("4", "a", name="Poster"),
        row("5", "a", name="POSTER"),
        row("6", "a", name="poster-5"),
        row("7", "a", name="con/aux"),
    ]
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows(rows)
        stems = [record.file_stem for record in await ledger.list_rows()]
    assert stems[:2] == ["0001-etc-passwd", "0002-日本"]
    assert len(stems[2]) <= 45
    assert stems[3:] == ["Poster", "POSTER-5", "poster-5-6", "con-aux"]


async def test_a_row_with_a_key_may_be_edited_until_it_is_charged(tmp_path: Path) -> None:
    """After that, the key belongs to the charged prompt."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.upsert_rows([row(prompt="a hare")])
        assert (await record_of(ledger)).prompt == "a hare"
        await ledger.begin_attempt("k")
        await ledger.upsert_rows([row(prompt="an owl")])
        kept = await record_of(ledger)
        assert (kept.prompt, kept.state) == ("a hare", RowState.SUBMITTING)


async def test_the_file_is_private_and_every_commit_is_synced(tmp_path: Path) -> None:
    """Prompts are private, and WAL without FULL could lose commits in a power failure."""
    async with opened(tmp_path) as ledger:
        assert stat.S_IMODE((tmp_path / "ledger.db").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "ledger.db-wal").stat().st_mode) == 0o600
        settings = {
            name: ledger._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2}


async def test_many_writers_share_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred concurrent rows need a few fsyncs."""
    commits = 0
    commit = BatchLedger._commit

    def counted(self: BatchLedger, orders: list[object]) -> None:
        nonlocal commits
        commits += 1
        commit(self, orders)  # type: ignore[arg-type]

    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row(str(number)) for number in range(100)])
        monkeypatch.setattr(BatchLedger, "_commit", counted)
        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(ledger.begin_attempt, str(number))
        assert len(await ledger.list_rows(RowState.SUBMITTING)) == 100
    assert commits <= 4


async def test_cancelling_does_not_interrupt_a_write(tmp_path: Path) -> None:
    """The write is committed even if its caller is cancelled."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        with anyio.CancelScope() as scope:
            scope.cancel()
            await ledger.begin_attempt("k")
        assert (await record_of(ledger)).state is RowState.SUBMITTING


# --- locking --------------------------------------------------------------------------------------------------------

_HOLD = """
import sys, time, anyio
from pathlib import Path
from nanobanana_async.ledger.batch_ledger import BatchLedger
async def main():
    ledger = await BatchLedger.open(Path(sys.argv[1]))
    print("open", flush=True)
    time.sleep(60)
anyio.run(main)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    """It is refused within a second, and a killed holder holds nothing."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:  # noqa: ASYNC220, S603 - started here
        assert holder.stdout is not None
        holder.stdout.readline()
        began_s = time.monotonic()
        with pytest.raises(
            LedgerError, match=f"in use by process {holder.pid} on .*Wait until it has finished"
        ) as caught:
            await BatchLedger.open(tmp_path)
        assert time.monotonic() - began_s < 1
        assert caught.value.pid == holder.pid
        holder.kill()
        holder.wait()
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])


async def test_the_same_process_cannot_open_it_twice(tmp_path: Path) -> None:
    """Two batches in one folder would charge each row twice; a refusal keeps the lock."""
    async with opened(tmp_path):
        for _ in range(2):
            with pytest.raises(LedgerError, match=f"in use by process {os.getpid()}"):
                await BatchLedger.open(tmp_path)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_open_leaves_the_folder_free(tmp_path: Path) -> None:
    """`task.cancel()` does not wait for the opening thread, whose ledger must not keep the lock."""
    for number in range(40):
        opening = asyncio.create_task(BatchLedger.open(tmp_path))
        await asyncio.sleep(number * 0.0005)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await opening).aclose()
        with anyio.fail_after(5):
            while True:
                with contextlib.suppress(LedgerError):
                    await (await BatchLedger.open(tmp_path)).aclose()
                    break


async def test_a_copy_is_rejected_until_it_is_adopted(tmp_path: Path) -> None:
    """Copy and original would submit the same rows; a renamed folder is not a copy."""
    async with opened(tmp_path / "a") as ledger:
        await ledger.upsert_rows([row()])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(LedgerError, match=r"is a copy.*resolve adopt"):
        await BatchLedger.open(tmp_path / "b")
    async with opened(tmp_path / "b", adopt=True) as ledger:
        assert (await record_of(ledger)).state is RowState.READY
    async with opened(tmp_path / "b"):
        pass
    (tmp_path / "a").rename(tmp_path / "c")
    async with opened(tmp_path / "c"):
        pass


# --- damaged ledgers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(lambda path: path.write_bytes(b"not a database" * 100), "not a database", id="garbage"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:6000] + b"\xff" * 4096 + path.read_bytes()[10_096:]),
            "is damaged|malformed",
            id="damaged-in-the-middle",
        ),
        pytest.param(
            lambda path: sqlite3.connect(path).execute("PRAGMA user_version=99").connection.close(),
            "newer version",
            id="newer",
        ),
    ],
)
async def test_a_ledger_that_cannot_be_trusted_is_not_opened(tmp_path: Path, spoil: object, says: str) -> None:
    """A damaged or newer ledger is an error, and nothing is submitted."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row(str(number)) for number in range(200)])
    spoil(tmp_path / "ledger.db")  # type: ignore[operator]
    with pytest.raises(LedgerError, match=says):
        await BatchLedger.open(tmp_path)


async def test_an_empty_file_is_a_new_ledger(tmp_path: Path) -> None:
    """The program may have died between creating and filling the file."""
    (tmp_path / "ledger.db").touch()
    async with opened(tmp_path) as ledger:
        assert await ledger.list_rows() == []


async def test_a_missing_ledger_is_not_created_by_resolve(tmp_path: Path) -> None:
    """A mistyped folder is an error."""
    with pytest.raises(LedgerError, match="not found"):
        await BatchLedger.open(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()


async def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A file in place of the folder is treated like a read-only folder."""
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be opened"):
        await BatchLedger.open(tmp_path / "file" / "run")


async def test_after_a_failed_write_every_write_fails(tmp_path: Path) -> None:
    """The first failure stands even when there is space again, and durable data is kept."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row("1")])
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(LedgerError, match="full"):
            await ledger.upsert_rows([row(str(number), "x" * 2000) for number in range(2, 50)])
        ledger._db.execute("PRAGMA max_page_count=100000")
        with pytest.raises(LedgerError, match="Nothing more is submitted"):
            await ledger.begin_attempt("1")
    async with opened(tmp_path) as ledger:
        assert [(record.key, record.state) for record in await ledger.list_rows()] == [("1", RowState.READY)]


async def test_a_reason_that_is_not_valid_text_is_stored(tmp_path: Path) -> None:
    """A path in an error may contain bytes that cannot be decoded."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row()])
        await ledger.begin_attempt("k")
        await ledger.transition("k", RowState.FAILED, reason=os.fsdecode(b"caf\xe9.png: no"))
        assert (await record_of(ledger)).reason == "caf?.png: no"


@pytest.mark.parametrize("group_commit_s", [-1, 1e9, math.nan])
async def test_a_wait_for_a_group_commit_is_at_most_one_second(tmp_path: Path, group_commit_s: float) -> None:
    """A longer wait would block every row of a batch."""
    with pytest.raises(ValueError, match="group_commit_s: expected 0 to 1 second, got"):
        await BatchLedger.open(tmp_path, group_commit_s=group_commit_s)
    assert list(tmp_path.iterdir()) == []


async def test_t3_a_report_reads_small_pages_between_the_writes(tmp_path: Path) -> None:
    """T3: a report over 100,000 rows held the ledger for 2.5 s."""
    async with opened(tmp_path) as ledger:
        await ledger.upsert_rows([row(str(number)) for number in range(250)])
        sizes = []
        async for page in ledger.pages():
            sizes.append(len(page))
            await ledger.begin_attempt(page[0].key)
        assert sizes == [100, 100, 50]
        assert len(await ledger.list_rows(RowState.SUBMITTING)) == 3
