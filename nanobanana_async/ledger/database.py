"""Open a ledger: lock it, check that it knows all that its surroundings know, and adopt what it does not.

A ledger that was copied, restored from a backup, or has lost its write-ahead log would let rows be charged again. What
remembers more than the database gives it away: the lock file, the manifest, and the images.
"""

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self, cast

import attrs

from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import schema
from nanobanana_async.ledger.lock import LedgerLock, LockRecord
from nanobanana_async.ledger.schema import RowState

FILE_NAME: Final = "ledger.db"
LOCK_NAME: Final = "ledger.lock"
MANIFEST_NAME: Final = "manifest.jsonl"
LOCATION_NAME: Final = "ledger.location"
"""In the folder of the images: where the ledger is, if it is elsewhere."""
_MAX_ATTEMPTS: Final = 1000
_BUSY_TIMEOUT_S: Final = 0.5
_INTERRUPTED_REASON: Final = "the program ended before a response arrived"
_INTERRUPT_ATTEMPTS: Final = "UPDATE attempts SET state = 'unknown', reason = ? WHERE state = 'submitting'"
_IMAGE_SUFFIXES: Final = (".png", ".jpg", ".webp", ".gif")


@attrs.frozen(kw_only=True)
class OpenDatabase:
    """A ledger that this process holds."""

    connection: sqlite3.Connection
    lock: LedgerLock
    image_stems: frozenset[str]
    """Stems of the images in the folder when it was opened, in lower case."""

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


def open_database(folder: Path, ledger_folder: Path, *, adopt: bool, create: bool) -> OpenDatabase:
    """Open, lock and check the ledger in *ledger_folder*, whose images and manifest are in *folder*. Blocking.

    Raises:
        LedgerError: Another process holds it, or it is damaged, of a newer version, missing, or knows too little.
    """
    path = ledger_folder / FILE_NAME
    try:
        if create:
            _create_folders(folder, ledger_folder)
        elif not path.exists():
            raise LedgerError(f"{path}: not found. Pass the --out folder of a batch.")
        lock = LedgerLock(ledger_folder / LOCK_NAME)
    except OSError as exc:
        raise LedgerError(f"{path}: cannot be opened: {exc.strerror or exc}") from exc
    db: sqlite3.Connection | None = None
    try:
        if not path.exists():  # an existing file is not opened: closing it would drop SQLite's own lock
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600))
        db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        opened = OpenDatabase(connection=db, lock=lock, image_stems=_image_stems(folder))
        _Opening(opened, path, folder).run(adopt=adopt)
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


def _create_folders(folder: Path, ledger_folder: Path) -> None:
    for needed in (folder, ledger_folder):
        needed.mkdir(parents=True, exist_ok=True)
    if ledger_folder.resolve() != folder.resolve():
        (folder / LOCATION_NAME).write_text(f"{ledger_folder.resolve()}\n", encoding="utf-8")


def ledger_location(folder: Path, wanted: Path | None) -> Path:
    """Return the folder of the ledger of *folder*: *wanted*, else where it is known to be, else *folder*.

    Raises:
        LedgerError: The ledger is in another folder than *wanted*. A second one would charge its rows again.
    """
    known = None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        known = Path((folder / LOCATION_NAME).read_text(encoding="utf-8", errors="replace").strip())
        if not known.is_absolute():
            raise LedgerError(
                f"{folder / LOCATION_NAME}: expected the path of the ledger's folder, got {str(known)!r:.80}"
            )
    if known is None and (folder / FILE_NAME).exists():
        known = folder.resolve()
    if known is not None and wanted is not None and wanted.resolve() != known:
        raise LedgerError(f"{folder}: its ledger is in {known}, got {wanted}. Pass --ledger {known}.")
    return wanted or known or folder


def _open_error(path: Path, exc: Exception) -> LedgerError:
    if getattr(exc, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LedgerError(f"{path}: in use by another program. Close it, and try again.")
    return LedgerError(f"{path}: cannot be used: {getattr(exc, 'strerror', None) or exc}")


def _image_stems(folder: Path) -> frozenset[str]:
    return frozenset(entry.stem.lower() for entry in folder.iterdir() if entry.suffix in _IMAGE_SUFFIXES)


def _meta(db: sqlite3.Connection) -> dict[str, str | int]:
    return dict(db.execute("SELECT name, value FROM meta").fetchall())


class _Opening:
    """The checks and repairs of one opening, in one transaction."""

    def __init__(self, opened: OpenDatabase, path: Path, folder: Path) -> None:
        self._db = opened.connection
        self._found = opened.lock.found
        self._image_stems = opened.image_stems
        self._path = path
        self._folder = folder

    def run(self, *, adopt: bool) -> None:
        """Create the tables or check them, and begin a run. Attempts that were interrupted become unknown."""
        db = self._db
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA fullfsync=ON")  # on macOS, fsync does not reach the disk without it
        db.execute("BEGIN EXCLUSIVE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > schema.SCHEMA_VERSION:
            raise self._error(f"written by a newer version, got schema {version}. Upgrade nanobanana-async.")
        if (check := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise self._error(f"is damaged ({check}). Restore it from a backup.")
        if version == 0:
            self._create()
        elif adopt:
            self._adopt()
        elif problem := self._problem():
            raise self._error(
                f"{problem}. Running it could charge rows twice. If no other copy was run since, or will be, run: "
                f"nanobanana batch resolve adopt --out {self._folder}"
            )
        db.execute("UPDATE meta SET value = value + 1 WHERE name IN ('run', 'commits')")
        db.execute(_INTERRUPT_ATTEMPTS, (_INTERRUPTED_REASON,))
        db.execute("COMMIT")

    def _error(self, problem: str) -> LedgerError:
        return LedgerError(f"{self._path}: {problem}")

    def _inode(self) -> int:
        return self._path.stat().st_ino

    def _create(self) -> None:
        if self._found.ledger_id or (self._folder / MANIFEST_NAME).exists():
            raise self._error(
                f"missing or empty, but {self._folder} contains a batch that would be charged again. Restore the file, "
                "or use another folder."
            )
        for statement in schema.SCHEMA.split(";"):
            self._db.execute(statement)
        meta = {"ledger_id": secrets.token_hex(8), "instance": self._inode(), "run": 0, "commits": 0, "attempts": 0}
        self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        self._db.execute(f"PRAGMA user_version={schema.SCHEMA_VERSION}")

    def _problem(self) -> str | None:
        """Return why the ledger cannot be trusted, or None."""
        meta = _meta(self._db)
        # A process that was killed right after it had created the ledger leaves an empty lock file.
        is_new = not self._found.ledger_id and not meta["attempts"]
        if meta["instance"] != self._inode() or (meta["ledger_id"] != self._found.ledger_id and not is_new):
            return "is a copy of another ledger"
        if self._found.commits > int(meta["commits"]):
            lost = self._found.commits - int(meta["commits"])
            return f"lacks its last {lost} writes. It was restored from a backup, or {FILE_NAME}-wal is damaged"
        if any(True for _ in self._rows_known_elsewhere()):
            return f"lacks rows that {MANIFEST_NAME} contains. It was restored from a backup"
        if stem := next((stem for _, stem in self._submittable_rows() if stem.lower() in self._image_stems), None):
            return f"has no submit of {stem}, whose image exists. It was restored from a backup"
        return None

    def _adopt(self) -> None:
        """Accept the ledger. What its surroundings know of rows is recorded, and what is lost becomes unknown."""
        db, meta = self._db, _meta(self._db)
        for known in list(self._rows_known_elsewhere()):
            self._record_elsewhere(known)
        # A lock file that is missing or about another ledger does not say what was lost.
        is_same = self._found.ledger_id == meta["ledger_id"]
        lost = not is_same or self._found.attempts > int(_meta(db)["attempts"])
        for key, stem in list(self._submittable_rows()):
            if lost or stem.lower() in self._image_stems:
                schema.add_restored_attempt(db, key, RowState.UNKNOWN)
        # Rows that are not in the ledger may have been submitted, too.
        db.execute("INSERT OR REPLACE INTO meta VALUES ('adopted', ?)", (json.dumps(sorted(self._image_stems)),))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('lost', ?)", (int(lost or bool(meta.get("lost"))),))
        db.execute("UPDATE meta SET value = ? WHERE name = 'instance'", (self._inode(),))
        db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'commits'", (self._found.commits,))
        db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'run'", (self._found.run,))

    def _submittable_rows(self) -> Iterator[tuple[str, str]]:
        """Yield key and file stem of the rows that a run could submit."""
        for line in self._db.execute(schema.SELECT_ROWS):
            if RowState(line["state"]).is_submittable:
                yield line["key"], line["file_stem"]

    def _rows_known_elsewhere(self) -> Iterator["_ManifestLine"]:
        """Yield the lines of the manifest about submits that the ledger does not have."""
        manifest = self._folder / MANIFEST_NAME
        with contextlib.suppress(FileNotFoundError), manifest.open(encoding="utf-8", errors="replace") as lines:
            for text in lines:
                try:
                    known = _ManifestLine.parse(text)
                except (LookupError, ValueError, TypeError, RecursionError):
                    continue  # not written by this package
                if self._lacks(known):
                    yield known

    def _lacks(self, known: "_ManifestLine") -> bool:
        if known.state in (RowState.READY, RowState.REJECTED):
            return False
        mine = self._db.execute(f"{schema.SELECT_ROWS} WHERE key = ?", (known.key,)).fetchone()
        if mine is None or mine["attempt"] < known.attempt:
            return True
        return bool(mine["attempt"] == known.attempt and known.task_id and mine["task_id"] is None)

    def _record_elsewhere(self, known: "_ManifestLine") -> None:
        db = self._db
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
        stem = f"{number:04}-restored"
        db.execute(
            "INSERT OR IGNORE INTO rows (key, number, file_stem, fingerprint, prompt, model, image_size)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                known.key,
                number,
                stem,
                known.fingerprint,
                known.prompt,
                known.model,
                known.image_size,
            ),
        )
        missing = known.attempt - db.execute("SELECT attempt FROM rows WHERE key = ?", (known.key,)).fetchone()[0]
        for _ in range(missing - 1):
            schema.add_restored_attempt(db, known.key, RowState.UNKNOWN)
        state = RowState.UNKNOWN if known.task_id is None else RowState.SUBMITTED
        schema.add_restored_attempt(db, known.key, state, known.task_id)


_text = attrs.validators.and_(attrs.validators.instance_of(str), attrs.validators.min_len(1))


@attrs.frozen(kw_only=True)
class _ManifestLine:
    """What the manifest says of one row."""

    key: str = attrs.field(validator=_text)
    state: str
    attempt: int = attrs.field(validator=[attrs.validators.instance_of(int), attrs.validators.le(_MAX_ATTEMPTS)])
    fingerprint: str = attrs.field(validator=_text)
    prompt: str = attrs.field(validator=_text)
    model: str = attrs.field(validator=_text)
    image_size: str | None = attrs.field(validator=attrs.validators.optional(_text))
    task_id: str | None = attrs.field(validator=attrs.validators.optional(_text))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return a line of the manifest. Raises various exceptions if it is not one."""
        document = cast("dict[str, Any]", json.loads(text))
        line = cls(**{name: document[name] for name in attrs.fields_dict(cls)})
        for value in (line.key, line.prompt, line.model, line.task_id or ""):
            value.encode()  # a lone surrogate cannot be stored
        return line
