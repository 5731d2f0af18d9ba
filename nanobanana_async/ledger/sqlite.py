"""`Ledger`: the durable record of a batch. Attempt, task id, end and file are each durable before the next step.

WAL with synchronous=FULL: what a call has returned survives a power failure. Concurrent calls share one fsync.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Generic, Self, TypeVar

import anyio
import anyio.to_thread
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import schema
from nanobanana_async.ledger.database import FILE_NAME, OpenDatabase, ledger_location, open_database
from nanobanana_async.ledger.schema import AttemptCost, BatchRow, LedgerRow, RowState
from nanobanana_async.models import SavedImage
from nanobanana_async.protocols import AttemptEnd

T = TypeVar("T")


_CLOSE_POLL_S: Final = 0.005
GROUP_COMMIT_S: Final = 0.025
"""How long a write waits for others to share its fsync. A row needs four of them and takes seconds."""
_OWN_ERRORS: Final = (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError, sqlite3.IntegrityError)
"""Errors of one write, not of the disk: a value that cannot be stored."""


class _Write(Generic[T]):
    """One pending write, executed in a shared transaction."""

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self.work = work
        self.done = OneShotEvent()
        self.is_done = False
        self.value: T | None = None
        self.error: str | None = None


class Ledger:
    """The ledger of one batch folder. One process holds it at a time (see `ledger.lock`).

    After the first failed write, each further one raises `LedgerError` at once. After a failed fsync the contents of
    the disk are unknown, and a second fsync would succeed without meaning.
    """

    def __init__(self, folder: Path, path: Path, opened: OpenDatabase, group_commit_s: float) -> None:
        self.folder: Final = folder
        self._path = path
        self._group_commit_s = group_commit_s
        self._opened = opened
        self._db = opened.connection
        record = opened.record()
        self._run = record.run
        self.ledger_id: Final = record.ledger_id
        """Identity of the ledger: random text."""
        self._mutex = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self._is_writing = False
        self._opened_file_ids = self._file_ids()
        self._background = BackgroundTaskGroup()
        self._background.call_when_stopped(self._wake_pending)
        self._pending_writes: list[_Write[object]] = []
        self._failure: str | None = None
        self._is_closed = False

    # --- open and close ---------------------------------------------------------------------------------------------

    @classmethod
    async def open(
        cls,
        folder: Path,
        *,
        ledger_folder: Path | None = None,
        adopt: bool = False,
        create: bool = True,
        group_commit_s: float = GROUP_COMMIT_S,
    ) -> Self:
        """Open the ledger of *folder*. Attempts of an interrupted run become unknown.

        Args:
            folder: The folder of the batch.
            ledger_folder: Where the ledger is; None means where it was before, at first *folder*.
            adopt: Whether to accept a copied or restored ledger. Rows that it has lost become unknown.
            create: Whether to create the folder and the ledger if they are missing.
            group_commit_s: How long a write waits for others to share its fsync.

        Raises:
            LedgerError: Another process holds it, or it is damaged, a copy, restored, of a newer version, or missing.
            ValueError: *group_commit_s* is not between 0 and 1.
        """
        if not 0 <= group_commit_s <= 1:  # false for nan, too
            raise ValueError(f"group_commit_s: expected 0 to 1 second, got {group_commit_s:g}")
        home = ledger_location(folder, ledger_folder)
        ledgers: list[Self] = []
        has_left = threading.Event()

        def work() -> None:
            opened = open_database(folder, home, adopt=adopt, create=create)
            ledgers.append(cls(folder, home / FILE_NAME, opened, group_commit_s))
            if has_left.is_set():
                ledgers[0]._close()  # noqa: SLF001 - an instance of this class

        try:
            await anyio.to_thread.run_sync(work)
            await ledgers[0]._background.ensure_started()  # noqa: SLF001 - an instance of this class
        except BaseException:  # `task.cancel()` does not wait for the thread, whose ledger would never be closed
            has_left.set()
            for ledger in ledgers:
                await ledger.aclose()
            raise
        return ledgers[0]

    async def aclose(self) -> None:
        """Close the ledger and release the lock."""
        with anyio.CancelScope(shield=True):
            try:
                while self._is_writing and self._background.is_open:  # noqa: ASYNC110 - once, for milliseconds
                    await anyio.sleep(_CLOSE_POLL_S)
                await self._background.aclose(drain_s=0)
                await anyio.to_thread.run_sync(self._close)
            finally:  # has an effect only if `task.cancel()` broke the shield
                self._background.request_stop(drain_s=0)
                self._close()

    def _close(self) -> None:
        with self._mutex:
            if self._is_closed:
                return
            self._is_closed = True
            is_intact, self._failure = self._failure is None, self._failure or "the batch is closed"
            with contextlib.suppress(OSError, sqlite3.Error):  # committed data is on the disk, checkpoint or not
                if is_intact:
                    self._opened.lock.write(attrs.evolve(self._opened.record(), pid=None))
                self._db.close()
            self._opened.lock.close()

    # --- one row ----------------------------------------------------------------------------------------------------

    async def upsert_rows(self, rows: Iterable[BatchRow]) -> list[LedgerRow]:
        """Return the ledger row of each of *rows*. New ones are inserted as ready."""
        rows, stems = list(rows), self._opened.image_stems
        return await self._commit_write(
            lambda db: [schema.to_ledger_row(schema.upsert_row(db, row, stems), self.folder) for row in rows]
        )

    async def begin_attempt(self, key: str, *, resubmit: bool = False, nonce: str | None = None) -> None:
        """Record that a POST is about to be sent.

        With *resubmit* it may follow an attempt of this run that may have been charged. *nonce* identifies the callback
        of this submit.
        """
        await self._commit_write(lambda db: schema.begin_attempt(db, key, resubmit=resubmit, nonce=nonce), key)

    async def end_attempt(self, key: str, end: AttemptEnd) -> None:
        """Record the end of the current attempt of *key*."""
        await self._commit_write(lambda db: schema.end_attempt(db, key, end), key)

    async def bind_by_nonce(self, nonce: str, task_id: str) -> None:
        """Record the task id of the submit with this *nonce*, if it is unknown."""
        await self._commit_write(lambda db: schema.bind_by_nonce(db, nonce, task_id))

    async def is_unresolved(self, nonce: str) -> bool:
        """Return whether the outcome of the submit with this *nonce* is unknown."""
        return await self._commit_write(lambda db: schema.is_unresolved(db, nonce))

    async def transition(self, key: str, state: RowState, **facts: str | float | None) -> None:
        """Set the state of the current attempt of *key*, and *facts* about it (columns of `attempts`)."""
        await self._commit_write(lambda db: schema.transition(db, key, state, facts), key)

    async def resolve(self, key: str, state: RowState) -> None:
        """Decide about the unknown row *key*: `REQUEUED` or `ABANDONED`."""
        await self.transition(key, state)

    async def bind(self, key: str, task_id: str) -> None:
        """Record the task id of the unknown row *key*. Raises if another row has that task."""
        await self._commit_write(lambda db: schema.bind_task(db, key, task_id), key)

    async def record_saved(self, key: str, files: Iterable[SavedImage]) -> None:
        """Record that the images of *key* are saved."""
        listed = json.dumps([[file.path.name, file.sha256, file.size_bytes] for file in files])
        await self.transition(key, RowState.SAVED, files=listed, saved_at=time.time())

    # --- all rows ---------------------------------------------------------------------------------------------------

    async def query_rows(self, use: Callable[[Iterator[LedgerRow]], T], *states: RowState) -> T:
        """Return the result of *use* on the rows in order, all or those in *states*. It runs in a thread."""
        where = f" WHERE coalesce(state, 'ready') IN ({', '.join('?' * len(states))})" if states else ""

        def work(db: sqlite3.Connection) -> T:
            found = db.execute(f"{schema.SELECT_ROWS}{where} ORDER BY number", states)
            return use(schema.to_ledger_row(line, self.folder) for line in found)

        return await self._commit_write(work)

    async def attempt_costs(self) -> list[AttemptCost]:
        """Return what each attempt of all runs says about money."""
        return await self._commit_write(lambda db: list(map(schema.to_attempt_cost, db.execute(schema.SELECT_COSTS))))

    async def service(self) -> schema.ServiceIdentity | None:
        """Return the service that the ledger is about; None if it is new."""
        return await self._commit_write(schema.service)

    async def set_service(self, base_url: str, account: str) -> None:
        """Record the service that the ledger is about. *account* is a digest of the key."""
        await self._commit_write(lambda db: schema.set_service(db, base_url, account))

    # --- the disk ---------------------------------------------------------------------------------------------------

    async def _commit_write(self, work: Callable[[sqlite3.Connection], T], key: str | None = None) -> T:
        """Return the result of *work* once it is on the disk.

        Group commit: waits `group_commit_s`, then commits all pending writes in one transaction. Not cancellable.
        """
        write = _Write(work)
        if not self._background.is_open:
            raise LedgerError(f"{self._path}: the ledger is closed")
        self._pending_writes.append(write)  # type: ignore[arg-type]  # the result type varies
        if not self._is_writing:
            self._is_writing = True
            self._background.start_soon(self._write_loop)
        with anyio.CancelScope(shield=True):
            await write.done.wait()
        if write.error is not None or not write.is_done:
            raise LedgerError(f"{self._path}: {write.error or 'the program ended before it was written'}")
        if key is not None and not write.value:
            raise LedgerError(f"row {key}: not found, or its state does not allow this")
        return write.value  # type: ignore[return-value]  # `value` is set if `error` is None

    async def _write_loop(self) -> None:
        """Commit pending writes until there are none. Runs in the background, so no caller can cancel it."""
        writes: list[_Write[object]] = []
        try:
            while self._pending_writes:
                await anyio.sleep(self._group_commit_s)
                writes, self._pending_writes = self._pending_writes, []
                await anyio.to_thread.run_sync(self._commit, writes, limiter=self._limiter)
                for write in writes:
                    write.done.set()
        finally:
            self._is_writing = False
            for write in writes:
                write.done.set()
            self._wake_pending()  # none are left, unless the event loop is ending

    def _wake_pending(self) -> None:
        """Wake the callers whose writes will not be executed."""
        for write in self._pending_writes:
            write.done.set()

    def _commit(self, writes: list[_Write[object]]) -> None:
        with self._mutex:
            try:
                if self._failure is None and not self._run_transaction(writes):
                    for write in writes:  # one of them cannot be stored: find out which, and commit the others
                        self._run_transaction([write])
            except (sqlite3.Error, OSError) as exc:
                self._failure = f"cannot be written: {exc}. Nothing more is submitted."
            for write in writes:
                if not write.is_done:
                    write.error = write.error or self._failure
                    write.is_done = True

    def _run_transaction(self, writes: list[_Write[object]]) -> bool:
        """Commit *writes* together. Return False if one of them cannot be stored, and nothing was committed.

        Raises:
            sqlite3.Error, OSError: The disk failed. What was committed is unknown.
        """
        if self._file_ids() != self._opened_file_ids:
            raise OSError("the file was removed or replaced")
        self._opened.lock.check(self._run)
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        changes = db.total_changes
        for write in writes:
            try:
                write.value = write.work(db)
            except Exception as exc:
                with contextlib.suppress(sqlite3.Error):  # the error has rolled it back
                    db.execute("ROLLBACK")
                if isinstance(exc, sqlite3.Error) and not isinstance(exc, _OWN_ERRORS):
                    raise
                if len(writes) == 1:
                    write.error = str(exc) if type(exc) is ValueError else f"cannot store this: {exc}"
                return False
        has_changed = db.total_changes != changes
        if has_changed:
            db.execute("UPDATE meta SET value = value + 1 WHERE name = 'commits'")
        db.execute("COMMIT")
        if has_changed:
            self._opened.lock.write(self._opened.record())
        for write in writes:
            write.is_done = True
        return True

    def _file_ids(self) -> list[int | None]:
        return [_inode(self._path.with_name(name)) for name in (FILE_NAME, f"{FILE_NAME}-wal")]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
