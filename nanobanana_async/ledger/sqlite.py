"""`LedgerFile`: one file of a ledger, its lock and its writer.

WAL with synchronous=FULL: what a call has returned survives a power failure. Concurrent calls share one fsync.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

import anyio
import anyio.to_thread
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger.database import OpenDatabase, inode

F = TypeVar("F", bound="LedgerFile")
T = TypeVar("T")


_CLOSE_POLL_S: Final = 0.005
GROUP_COMMIT_S: Final = 0.025
"""How long a write waits for others to share its fsync. A row needs four of them and takes seconds."""
_OWN_ERRORS: Final = (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError, sqlite3.IntegrityError)
"""Errors of one write, not of the disk: a value that cannot be stored."""


class _Write(Generic[T]):
    """One pending write, executed in a shared transaction."""

    def __init__(self, work: Callable[[sqlite3.Connection], T], *, is_checked: bool) -> None:
        self.work = work
        self.is_checked = is_checked
        self.done = OneShotEvent()
        self.is_done = False
        self.value: T | None = None
        self.error: str | None = None


class LedgerFile:
    """One file of a ledger, with its writer. One process holds it at a time (see `ledger.lock`).

    After the first failed write, each further one raises `LedgerError` at once. After a failed fsync the contents of
    the disk are unknown, and a second fsync would succeed without meaning.
    """

    def __init__(self, path: Path, opened: OpenDatabase, group_commit_s: float) -> None:
        self.path: Final = path
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

    @staticmethod
    async def _open(open_file: Callable[[], F]) -> F:
        """Return the instance that *open_file*, which blocks, has opened in a thread.

        `task.cancel()` does not wait for the thread, whose file would never be closed: it is closed then.
        """
        files: list[F] = []
        has_left = threading.Event()

        def work() -> None:
            files.append(open_file())
            if has_left.is_set():
                files[0]._close()  # noqa: SLF001 - an instance of this class

        try:
            await anyio.to_thread.run_sync(work)
            await files[0]._background.ensure_started()  # noqa: SLF001 - an instance of this class
        except BaseException:
            has_left.set()
            for file in files:
                await file.aclose()
            raise
        return files[0]

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
            is_intact, self._failure = self._failure is None, self._failure or "the ledger is closed"
            with contextlib.suppress(OSError, sqlite3.Error):  # committed data is on the disk, checkpoint or not
                if is_intact:
                    self._opened.lock.write(attrs.evolve(self._opened.record(), pid=None))
                self._db.close()
            self._opened.lock.close()

    # --- the disk ---------------------------------------------------------------------------------------------------

    async def commit(
        self, work: Callable[[sqlite3.Connection], T], key: str | None = None, *, is_checked: bool = False
    ) -> T:
        """Return the result of *work* once it is on the disk. With *key*, a false result is an error about that row.

        With *is_checked*, the transaction is guarded against other processes.

        Group commit: waits `group_commit_s`, then commits all pending writes in one transaction. Not cancellable.
        """
        write = self.enqueue(work, is_checked=is_checked)
        with anyio.CancelScope(shield=True):
            await write.done.wait()
        if write.error is not None or not write.is_done:
            raise LedgerError(f"{self.path}: {write.error or 'the program ended before it was written'}")
        if key is not None and not write.value:
            raise LedgerError(f"row {key}: not found, or its state does not allow this")
        return write.value  # type: ignore[return-value]  # `value` is set if `error` is None

    async def query(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of *work*, which changes nothing, at once. Raises and ignores cancellation as `commit`."""
        read: _Write[object] = _Write(work, is_checked=False)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._commit, [read], limiter=self._limiter)
        if read.error is not None:
            raise LedgerError(f"{self.path}: {read.error}")
        return read.value  # type: ignore[return-value]  # `value` is set if `error` is None

    def enqueue(self, work: Callable[[sqlite3.Connection], T], *, is_checked: bool = False) -> "_Write[T]":
        """Add *work* to the next transaction, and return without waiting for it. Closing the file waits."""
        if not self._background.is_open:
            raise LedgerError(f"{self.path}: the ledger is closed")
        write = _Write(work, is_checked=is_checked)
        self._pending_writes.append(write)  # type: ignore[arg-type]  # the result type varies
        if not self._is_writing:
            self._is_writing = True
            self._background.start_soon(self._write_loop)
        return write

    async def _write_loop(self) -> None:
        """Commit pending writes until there are none. Runs in the background, so no caller can cancel it."""
        writes: list[_Write[object]] = []
        try:
            while self._pending_writes:
                await anyio.sleep(self._group_commit_s)
                writes, self._pending_writes = self._pending_writes, []
                # Those that another process may delay come last, and alone.
                for group in ([w for w in writes if not w.is_checked], [w for w in writes if w.is_checked]):
                    if group:
                        await anyio.to_thread.run_sync(self._commit, group, limiter=self._limiter)
                    for write in group:
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
                if self._failure is None:
                    with self._transaction_guard(is_checked=any(write.is_checked for write in writes)):
                        self._run_transactions(writes)
            except LedgerError as exc:  # of the guard
                for write in writes:
                    write.error = str(exc)
            except (sqlite3.Error, OSError) as exc:
                self._failure = f"cannot be written: {exc}. Nothing more is submitted."
            for write in writes:
                if not write.is_done:
                    write.error = write.error or self._failure
                    write.is_done = True

    def _transaction_guard(self, *, is_checked: bool) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return what encloses a transaction, here nothing."""
        return contextlib.nullcontext()

    def _run_transactions(self, writes: list[_Write[object]]) -> None:
        if not self._run_transaction(writes):
            for write in writes:  # one of them cannot be stored: find out which, and commit the others
                self._run_transaction([write])

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
        return [inode(self.path), inode(self.path.with_name(f"{self.path.name}-wal"))]


def check_group_commit_s(group_commit_s: float) -> None:
    """Raise ValueError unless *group_commit_s* is 0 to 1 second."""
    if not 0 <= group_commit_s <= 1:  # false for nan, too
        raise ValueError(f"group_commit_s: expected 0 to 1 second, got {group_commit_s:g}")
