"""`TaskFile`: one file of single tasks. Other processes may read it while one process holds it."""

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger.database import accept_as_it_is, open_database
from nanobanana_async.ledger.lock import LockHeld, LockRecord, exclusive
from nanobanana_async.ledger.sqlite import LedgerFile

T = TypeVar("T")

_log: Final = logging.getLogger("nanobanana_async")

_MAX_FILES: Final = 1000
_BUSY_TIMEOUT_S: Final = 2.0
_BUDGET_LOCK_NAME: Final = "budget.lock"


class TaskFile(LedgerFile):
    """One file of single tasks, which this process holds."""

    is_released = False
    """Whether it was closed because nothing was left to acknowledge."""

    @staticmethod
    async def open_file(path: Path, group_commit_s: float) -> "TaskFile":
        """Open *path*. Attempts that were interrupted become unknown.

        Raises:
            LockHeld: Another process holds it.
            LedgerError: It cannot be used.
        """
        return await TaskFile._open(lambda: _open_task_file(path, group_commit_s))

    @staticmethod
    async def open_first(folder: Path, group_commit_s: float) -> "TaskFile":
        """Open the first file of *folder* that no process holds, or a new one. Raises as `open_file` does."""

        def open_file() -> "TaskFile":
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError as exc:
                raise LedgerError(f"{folder}: expected a folder, got a file") from exc
            except OSError as exc:
                raise LedgerError(f"{folder}: cannot be created: {exc.strerror}") from exc
            for number in range(1, _MAX_FILES + 1):
                path = folder / f"tasks-{number:03}.db"
                with contextlib.suppress(LockHeld):
                    return _open_task_file(path, group_commit_s)
            raise LedgerError(f"{folder}: {_MAX_FILES} processes use it. Use another folder.")

        return await TaskFile._open(open_file)

    def read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of *read*, for the thread that writes another file. It may have been closed meanwhile."""
        with self._mutex:
            if not self._is_closed:
                return read(self._db)
        try:
            with contextlib.closing(_connect_read_only(self.path)) as db:
                return read(db)
        except sqlite3.Error as exc:
            raise ValueError(f"{self.path} cannot be read: {exc}") from exc

    @contextlib.contextmanager
    def _transaction_guard(self, *, is_checked: bool) -> Generator[None]:
        """Let one process at a time compare the spending of all of them with a budget, and commit an attempt."""
        with exclusive(self.path.with_name(_BUDGET_LOCK_NAME)) if is_checked else contextlib.nullcontext():
            yield


def _open_task_file(path: Path, group_commit_s: float) -> TaskFile:
    try:
        return TaskFile(path, open_database(path, _TaskChecks(path)), group_commit_s)
    except LockHeld:
        raise
    except LedgerError as exc:
        lock = path.with_suffix(".lock").name
        raise LedgerError(f"{exc} To go on without its tasks, move {path.name} and {lock} to another folder.") from exc


class _TaskChecks:
    """The `OpeningChecks` of a file of single tasks: no task is submitted twice from it, so a copy does no harm."""

    @property
    def is_shared(self) -> bool:
        """See `OpeningChecks.is_shared`."""
        return True

    def __init__(self, path: Path) -> None:
        self._path = path

    def check_new(self, found: LockRecord) -> None:
        """See `OpeningChecks.check_new`."""
        if found.attempts:
            _log.error(
                "%s is missing or empty: %d submits and what they have cost are lost", self._path, found.attempts
            )

    def on_created(self, db: sqlite3.Connection) -> None:
        """See `OpeningChecks.on_created`."""

    def check_existing(self, db: sqlite3.Connection, found: LockRecord) -> None:
        """See `OpeningChecks.check_existing`."""
        meta = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('ledger_id', 'commits')").fetchall())
        if meta["ledger_id"] == found.ledger_id and found.commits > int(meta["commits"]):
            lost = found.commits - int(meta["commits"])
            _log.warning("%s lacks its last %d writes: it was restored, or its -wal file is lost", self._path, lost)
        accept_as_it_is(db, self._path, found)


def task_files(folder: Path) -> list[Path]:
    """Return the files of single tasks in *folder*, in the order of their numbers. Blocking."""
    return sorted(folder.glob("tasks-*.db"))


def read_elsewhere(folder: Path, held: Sequence[Path], read: Callable[[sqlite3.Connection], T]) -> Iterator[T]:
    """Yield the result of *read* on each file of *folder* that is not *held* by this process. Blocking.

    A read-only connection neither checkpoints nor removes the write-ahead log of the process that writes.

    Raises:
        ValueError: A file cannot be read.
    """
    for path in task_files(folder):
        if path in held:
            continue
        try:
            with contextlib.closing(_connect_read_only(path)) as db:
                if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                    continue  # it is being created
                yield read(db)
        except sqlite3.Error as exc:
            raise ValueError(f"{path} cannot be read: {exc}") from exc


def _connect_read_only(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    return db
