"""`LedgerLock`: one holder per ledger, and a second record of how much the ledger knows.

A file of its own, locked with flock. SQLite's POSIX locks are dropped when any other descriptor of the database file is
closed in the same process, as a backup tool or a web app that serves the folder does. The file is never removed: a new
one could be locked beside the old one.
"""

import contextlib
import json
import os
import platform
import sys
import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Final

import attrs
from attrs.validators import and_, ge, instance_of, lt, optional

from nanobanana_async.errors import LedgerError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_OTHER_MACHINE_GRACE_S: Final = 60.0
"""How long a lock that another machine wrote is respected, because locks may not reach across machines."""
_MAX_BYTES: Final = 4096
_EXCLUSIVE_TIMEOUT_S: Final = 30.0
_EXCLUSIVE_POLL_S: Final = 0.0005
"""Interval between two attempts to get a lock that other processes hold for a commit, about 1 ms."""
_LOCKED_AT: Final = 2**30
"""Byte that is locked on Windows, where a locked range cannot be read. No record is that long."""


def _machine() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


_is_count: Final = and_(instance_of(int), ge(0), lt(2**62))


@attrs.frozen(kw_only=True)
class LockRecord:
    """What the lock file says of the ledger beside it."""

    ledger_id: str = attrs.field(default="", validator=instance_of(str))
    """Identity of the ledger; "" in a new file."""
    run: int = attrs.field(default=0, validator=_is_count)
    """Number of times that the ledger was opened."""
    commits: int = attrs.field(default=0, validator=_is_count)
    """Number of transactions that were committed."""
    attempts: int = attrs.field(default=0, validator=_is_count)
    """Number of attempts in the ledger."""
    pid: int | None = attrs.field(default=None, validator=optional(_is_count))
    """The process that holds the ledger; None if it was closed."""
    host: str = attrs.field(default="", validator=instance_of(str))
    machine: str = attrs.field(default="", validator=instance_of(str))
    """Identity of the running system, which a restart changes."""


class LockHeld(LedgerError):
    """Another process holds the ledger, or did a moment ago on another machine."""


class LedgerLock:
    """A lock on *path* that lasts until `close` or the end of the process, and is not inherited by a fork.

    Raises:
        LedgerError: Another process holds it, or the file system cannot lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _open(path)
        try:
            self.found: Final = self._lock()
            """The record that the last holder has left."""
        except BaseException:
            self.close()
            raise
        _open_locks.add(self)

    def write(self, record: LockRecord) -> None:
        """Replace the record. Not synced: it is needed after a crash of the process, and may be behind after others."""
        mine = attrs.evolve(record, host=platform.node(), machine=_machine())
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, json.dumps(attrs.asdict(mine)).encode().ljust(_MAX_BYTES))

    def check(self, run: int) -> None:
        """Raise OSError if another run has the ledger, or if the lock file was removed or replaced."""
        held = os.fstat(self._descriptor)
        found = self._path.stat()
        if (held.st_dev, held.st_ino) != (found.st_dev, found.st_ino) or _read(self._descriptor).run != run:
            raise OSError("the lock was replaced, or another run has opened it")

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _lock(self) -> LockRecord:
        record = _read(self._descriptor)
        if not _try_lock(self._descriptor):
            holder = "another process" if record.pid is None else f"process {record.pid} on {record.host}"
            raise LockHeld(f"{self._path}: in use by {holder}. Wait until it has finished.", pid=record.pid)
        second = _open(self._path)
        try:
            if _try_lock(second):
                raise LedgerError(
                    f"{self._path}: the file system does not lock files, so two runs could charge the same rows. Keep "
                    "the ledger on a local disk: pass --ledger DIR."
                )
        finally:
            os.close(second)
        age_s = time.time() - os.fstat(self._descriptor).st_mtime
        if record.pid is not None and record.machine != _machine() and 0 <= age_s < _OTHER_MACHINE_GRACE_S:
            raise LockHeld(
                f"{self._path}: in use by process {record.pid} on {record.host}, or was {age_s:.0f} s ago. If that "
                f"machine has stopped, try again in {_OTHER_MACHINE_GRACE_S:.0f} s.",
                pid=record.pid,
            )
        return record


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags, 0o600)
    except PermissionError as exc:
        raise LedgerError(
            f"{path}: this user may not write it, or its folder. Change the owner, or keep the ledger elsewhere: pass "
            "--ledger DIR."
        ) from exc
    except OSError as exc:
        raise LedgerError(f"{path}: cannot be opened: {exc.strerror}") from exc


@contextlib.contextmanager
def exclusive(path: Path) -> Generator[None]:
    """Hold *path*, a lock file between processes, during the block. Blocking.

    Raises:
        LedgerError: It cannot be opened, or another process has held it for `_EXCLUSIVE_TIMEOUT_S`.
    """
    descriptor = _open(path)
    _exclusive_descriptors.add(descriptor)
    try:
        waited_since_s = time.monotonic()
        while not _try_lock(descriptor):
            if time.monotonic() - waited_since_s > _EXCLUSIVE_TIMEOUT_S:
                raise LockHeld(f"{path}: held by another process for {_EXCLUSIVE_TIMEOUT_S:.0f} s")
            time.sleep(_EXCLUSIVE_POLL_S)
        yield
    finally:
        _exclusive_descriptors.discard(descriptor)
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCKED_AT, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _read(descriptor: int) -> LockRecord:
    """Return the record; an empty one if the file is new or cannot be decoded."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return LockRecord(**json.loads(os.read(descriptor, _MAX_BYTES)))
    return LockRecord()


_exclusive_descriptors: Final[set[int]] = set()
_open_locks: Final[weakref.WeakSet[LedgerLock]] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        lock.close()
    for descriptor in _exclusive_descriptors:
        os.close(descriptor)
    _exclusive_descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
