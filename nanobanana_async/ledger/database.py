"""Open the file of a ledger: lock it, check it, and begin a run."""

import os
import secrets
import sqlite3
from pathlib import Path
from typing import Final, Protocol

import attrs

from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import schema
from nanobanana_async.ledger.lock import LedgerLock, LockRecord

_BUSY_TIMEOUT_S: Final = 0.5
_INTERRUPTED_REASON: Final = "the program ended before a response arrived"
_INTERRUPT_ATTEMPTS: Final = "UPDATE attempts SET state = 'unknown', reason = ? WHERE state = 'submitting'"


class OpeningChecks(Protocol):
    """What one kind of ledger checks when it is opened, in the opening transaction."""

    @property
    def is_shared(self) -> bool:
        """Whether other processes may read the file meanwhile."""
        ...

    def check_new(self, found: LockRecord) -> None:
        """Raise LedgerError if there should be a ledger. *found* is what the lock file says."""
        ...

    def on_created(self, db: sqlite3.Connection) -> None:
        """Record what a new ledger has to know of its surroundings."""
        ...

    def check_existing(self, db: sqlite3.Connection, found: LockRecord) -> None:
        """Raise LedgerError if the ledger knows less than its surroundings, or accept it."""
        ...


@attrs.frozen(kw_only=True)
class OpenDatabase:
    """A ledger that this process holds."""

    connection: sqlite3.Connection
    lock: LedgerLock

    def record(self) -> LockRecord:
        """Return what the lock file has to say about the ledger now."""
        # By name: after an adoption, meta also has the names of all images, and this runs with each commit.
        names = "name IN ('ledger_id', 'run', 'commits', 'attempts')"
        meta = dict(self.connection.execute(f"SELECT name, value FROM meta WHERE {names}").fetchall())
        return LockRecord(
            ledger_id=str(meta["ledger_id"]),
            run=int(meta["run"]),
            commits=int(meta["commits"]),
            attempts=int(meta["attempts"]),
            pid=os.getpid(),
        )


def open_database(path: Path, checks: OpeningChecks) -> OpenDatabase:
    """Open, lock and check the ledger *path*, which is created if missing. Blocking.

    Raises:
        LedgerError: Another process holds it, or it is damaged, of a newer version, or refused by *checks*.
    """
    if path.is_symlink():  # SQLite follows links, and in a shared folder another user can make one
        raise LedgerError(f"{path}: is a symbolic link. Pass the folder of the file itself.")
    lock = LedgerLock(path.with_suffix(".lock"))
    db: sqlite3.Connection | None = None
    try:
        if not path.exists():  # an existing file is not opened: closing it would drop SQLite's own lock
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600))
        db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        opened = OpenDatabase(connection=db, lock=lock)
        _begin_run(opened, path, checks)
        lock.write(opened.record())
    except BaseException as exc:
        if db is not None:
            db.close()
        lock.close()
        if isinstance(exc, sqlite3.Error | OSError):
            raise _open_error(path, exc) from exc
        if isinstance(exc, LookupError | ValueError | TypeError):  # values that this package does not write
            raise LedgerError(f"{path}: is damaged ({type(exc).__name__}: {exc}). Restore it from a backup.") from exc
        raise
    return opened


def _begin_run(opened: OpenDatabase, path: Path, checks: OpeningChecks) -> None:
    """Create the tables or check them, and begin a run. Attempts that were interrupted become unknown."""
    db, found = opened.connection, opened.lock.found
    db.execute(f"PRAGMA locking_mode={'NORMAL' if checks.is_shared else 'EXCLUSIVE'}")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA fullfsync=ON")  # on macOS, fsync does not reach the disk without it
    db.execute("BEGIN EXCLUSIVE")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > schema.SCHEMA_VERSION:
        raise LedgerError(f"{path}: written by a newer version, got schema {version}. Upgrade nanobanana-async.")
    if (check := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise LedgerError(f"{path}: is damaged ({check}). Restore it from a backup.")
    if version == 0:
        checks.check_new(found)
        _create(db, path)
        checks.on_created(db)
    else:
        checks.check_existing(db, found)
    db.execute("UPDATE meta SET value = value + 1 WHERE name IN ('run', 'commits')")
    db.execute(_INTERRUPT_ATTEMPTS, (_INTERRUPTED_REASON,))
    db.execute("COMMIT")


def _create(db: sqlite3.Connection, path: Path) -> None:
    for statement in schema.SCHEMA.split(";"):
        db.execute(statement)
    meta = {
        "ledger_id": secrets.token_hex(8),
        "instance": inode(path),
        "run": 0,
        "commits": 0,
        "attempts": 0,
        "listing": 0,
    }
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    db.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION}")


def accept_as_it_is(db: sqlite3.Connection, path: Path, found: LockRecord) -> None:
    """Make *path* the true ledger, whatever the lock file says of another one."""
    db.execute("UPDATE meta SET value = ? WHERE name = 'instance'", (inode(path),))
    db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'commits'", (found.commits,))
    db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'run'", (found.run,))


def inode(path: Path) -> int | None:
    """Return the inode of *path*; None if it does not exist."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _open_error(path: Path, exc: Exception) -> LedgerError:
    code = getattr(exc, "sqlite_errorcode", 0)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        # The lock file is held, so this is no other run. File systems without POSIX locks report the same error.
        return LedgerError(
            f"{path}: cannot be locked. Another program has it open, or the file system does not lock files. Close the "
            "program, or keep the ledger on a local disk: pass --ledger DIR."
        )
    if (path.exists() and not os.access(path, os.R_OK | os.W_OK)) or not os.access(path.parent, os.W_OK | os.X_OK):
        return LedgerError(
            f"{path}: this user may not write it, or its folder. Change the owner, or keep the ledger elsewhere: pass "
            "--ledger DIR."
        )
    return LedgerError(f"{path}: cannot be used: {getattr(exc, 'strerror', None) or exc}.")
