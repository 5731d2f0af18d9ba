"""`Ledger`: the durable record of a batch. Attempt, task id, end and file are each durable before the next step.

WAL with synchronous=FULL: what a call has returned survives a power failure. Concurrent calls share one fsync.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Final, Generic, Self, TypeVar

import anyio
import anyio.to_thread

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.events import OneShotEvent
from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import schema
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.models import SavedImage

T = TypeVar("T")


_FILE_NAME: Final = "ledger.db"
_BUSY_TIMEOUT_S: Final = 0.5
_CLOSE_POLL_S: Final = 0.005
GROUP_COMMIT_S: Final = 0.025
"""How long a write waits for others to share its fsync. A row needs four of them and takes seconds."""
_INTERRUPTED_REASON: Final = "the program ended before a response arrived"


class _Write(Generic[T]):
    """One pending write, executed in a shared transaction."""

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self.work = work
        self.done = OneShotEvent()
        self.is_done = False
        self.value: T | None = None
        self.error: str | None = None


class Ledger:
    """The ledger of one batch folder. One process holds it at a time. The file lock ends with the process.

    After the first failed write, each further one raises `LedgerError` at once. After a failed fsync the contents of
    the disk are unknown, and a second fsync would succeed without meaning.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection, group_commit_s: float) -> None:
        self.folder: Final = folder
        self._group_commit_s = group_commit_s
        self._db = connection
        self._db.row_factory = sqlite3.Row
        self._mutex = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self._is_writing = False
        self._opened_file_ids = self._file_ids()
        self._background = BackgroundTaskGroup()
        self._pending_writes: list[_Write[object]] = []
        self._failure: str | None = None
        self._is_closed = False
        self._background.on_stopped = self._wake_pending

    # --- open and close ---------------------------------------------------------------------------------------------

    @classmethod
    async def open(
        cls, folder: Path, *, adopt: bool = False, create: bool = True, group_commit_s: float = GROUP_COMMIT_S
    ) -> Self:
        """Open the ledger of *folder*. Attempts of an interrupted run become unknown.

        Args:
            folder: The folder of the batch.
            adopt: Whether to accept a copied or restored ledger as the original.
            create: Whether to create the folder and the ledger if they are missing.
            group_commit_s: How long a write waits for others to share its fsync.

        Raises:
            LedgerError: Another process holds it, or it is damaged, a copy, of a newer version, or missing.
            ValueError: *group_commit_s* is not between 0 and 1.
        """
        if not 0 <= group_commit_s <= 1:  # false for nan, too
            raise ValueError(f"group_commit_s: expected 0 to 1 second, got {group_commit_s:g}")
        ledgers: list[Self] = []
        has_left = threading.Event()

        def work() -> None:
            ledgers.append(cls(folder, _connect(folder, adopt=adopt, create=create), group_commit_s))
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
            self._failure = self._failure or "the batch is closed"
            try:
                (self.folder / "ledger.pid").unlink(missing_ok=True)
                self._db.close()
            except (OSError, sqlite3.Error):
                pass  # committed data is on the disk; the next open repeats a failed checkpoint

    # --- one row ----------------------------------------------------------------------------------------------------

    async def upsert_rows(self, rows: Iterable[BatchRow]) -> list[LedgerRow]:
        """Return the ledger row of each of *rows*. New ones are inserted as ready."""
        rows = list(rows)
        return await self._commit_write(
            lambda db: [schema.to_ledger_row(schema.upsert_row(db, row), self.folder) for row in rows]
        )

    async def begin_attempt(self, key: str, *, resubmit: bool = False, nonce: str | None = None) -> None:
        """Record that a POST is about to be sent. With *resubmit* it is another POST of the current attempt.

        *nonce* identifies the callback of this submit.
        """
        await self._commit_write(
            lambda db: schema.count_resubmit(db, key) if resubmit else schema.begin_attempt(db, key, nonce), key
        )

    async def bind_by_nonce(self, nonce: str, task_id: str) -> None:
        """Record the task id of the submit with this *nonce*, if it is unknown."""
        await self._commit_write(lambda db: schema.bind_by_nonce(db, nonce, task_id))

    async def is_unresolved(self, nonce: str) -> bool:
        """Return whether the outcome of the submit with this *nonce* is unknown."""
        return await self._commit_write(lambda db: schema.is_unresolved(db, nonce))

    async def transition(self, key: str, state: RowState, **facts: str | float | None) -> None:
        """Set the state of the current attempt of *key*, and *facts* about it (columns of `attempts`)."""
        await self._commit_write(lambda db: schema.transition(db, key, state, facts), key)

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

    async def attempt_costs(self) -> list[tuple[str, int, Decimal | None]]:
        """Return model, number of submits that may still cost, and credits charged, for each attempt."""

        def work(db: sqlite3.Connection) -> list[tuple[str, int, Decimal | None]]:
            lines = db.execute("SELECT model, state, submit_count, consumed FROM attempts JOIN rows USING (key)")
            return [schema.attempt_cost(line) for line in lines]

        return await self._commit_write(work)

    # --- the disk ---------------------------------------------------------------------------------------------------

    async def _commit_write(self, work: Callable[[sqlite3.Connection], T], key: str | None = None) -> T:
        """Return the result of *work* once it is on the disk.

        Group commit: waits `group_commit_s`, then commits all pending writes in one transaction. Not cancellable.
        """
        write = _Write(work)
        if not self._background.is_open:
            raise LedgerError(f"{self.folder / _FILE_NAME}: the ledger is closed")
        self._pending_writes.append(write)  # type: ignore[arg-type]  # the result type varies
        if not self._is_writing:
            self._is_writing = True
            self._background.start_soon(self._write_loop)
        with anyio.CancelScope(shield=True):
            await write.done.wait()
        if write.error is not None or not write.is_done:
            raise LedgerError(f"{self.folder / _FILE_NAME}: {write.error or 'the program ended before it was written'}")
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
            if self._failure is None:
                try:
                    self._run_transaction(writes)
                except Exception:  # noqa: BLE001 - one of them fails: find out which, and commit the others
                    for write in writes:
                        self._commit_alone(write)
            for write in writes:
                write.error = write.error or self._failure
                write.is_done = True

    def _commit_alone(self, write: _Write[object]) -> None:
        if self._failure is not None:
            return
        try:
            self._run_transaction([write])
        except (sqlite3.Error, OSError) as exc:
            self._failure = f"cannot be written: {exc}. Nothing more is submitted."
        except Exception as exc:  # noqa: BLE001 - the value cannot be stored
            write.error = f"cannot store this: {exc}"

    def _run_transaction(self, writes: list[_Write[object]]) -> None:
        if self._file_ids() != self._opened_file_ids:
            raise OSError("the file was removed or replaced")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                write.value = write.work(self._db)
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _file_ids(self) -> list[int | None]:
        return [_inode(self.folder / name) for name in (_FILE_NAME, f"{_FILE_NAME}-wal")]


def _connect(folder: Path, *, adopt: bool, create: bool) -> sqlite3.Connection:
    """Open, lock and check the database of *folder*."""
    path = folder / _FILE_NAME
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        _create_private_file(path, create=create)
        db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as exc:
        raise LedgerError(f"{path}: cannot be opened: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        _initialize(db, path, adopt=adopt)
        (folder / "ledger.pid").write_text(f"{os.getpid()}\n")
    except (sqlite3.Error, OSError) as exc:
        db.close()
        raise _open_error(path, exc) from exc
    except LedgerError:
        db.close()
        raise
    return db


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _create_private_file(path: Path, *, create: bool) -> None:
    """Create the file with mode 0600. An existing file is not opened: closing it would drop SQLite's lock."""
    if not path.exists():
        if not create:
            raise LedgerError(f"{path}: not found. Pass the --out folder of a batch.")
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _initialize(db: sqlite3.Connection, path: Path, *, adopt: bool) -> None:
    """Lock and check the file, create the tables if needed, and set interrupted attempts to unknown."""
    db.execute("PRAGMA locking_mode=EXCLUSIVE")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA fullfsync=ON")  # on macOS, fsync does not reach the disk without it
    db.execute("BEGIN EXCLUSIVE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > schema.SCHEMA_VERSION:
        raise LedgerError(f"{path}: written by a newer version, got schema {version}. Upgrade nanobanana-async.")
    if (check := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise LedgerError(f"{path}: is damaged ({check}). Restore it from a backup.")
    instance = path.stat().st_ino
    if version == 0:
        if (path.parent / "manifest.jsonl").exists():
            raise LedgerError(
                f"{path}: missing or empty, but {path.parent} contains a batch that would be charged again. "
                "Restore the file, or use another folder."
            )
        for statement in schema.SCHEMA.split(";"):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('instance', ?)", (instance,))
        db.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION}")
    known = db.execute("SELECT value FROM meta WHERE name = 'instance'").fetchone()[0]
    if known != instance and not adopt:
        raise LedgerError(
            f"{path}: is a copy of another ledger. Running both could charge rows twice. If you no longer use the "
            f"original, run: nanobanana batch resolve --out {path.parent} --adopt"
        )
    db.execute("UPDATE meta SET value = ? WHERE name = 'instance'", (instance,))
    db.execute("UPDATE attempts SET state = 'unknown', reason = ? WHERE state = 'submitting'", (_INTERRUPTED_REASON,))
    db.execute("COMMIT")


def _open_error(path: Path, exc: Exception) -> LedgerError:
    if getattr(exc, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        try:
            pid = int((path.parent / "ledger.pid").read_text())
        except (OSError, ValueError):
            pid = None
        holder = "another process" if pid is None else f"process {pid}"
        return LedgerError(f"{path}: in use by {holder}. Wait until it has finished.", pid=pid)
    return LedgerError(f"{path}: cannot be used: {getattr(exc, 'strerror', None) or exc}")
