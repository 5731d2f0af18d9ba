"""What stands in a ledger: the tables, the states of a row, and which may follow which. SQL, and no disk of its own."""

import enum
import json
import sqlite3
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Final

import attrs

from nanobanana_async._text import safe_name
from nanobanana_async.batch.rows import BatchRow
from nanobanana_async.models import SavedImage


class RowState(enum.StrEnum):
    """Where a row stands: its last attempt, or `OPEN` when there is none."""

    OPEN = "open"
    """Not submitted."""
    INTENT = "intent"
    """A POST is about to leave, or has left."""
    REFUSED = "refused"
    """The service provably did not take it: open again."""
    UNKNOWN = "unknown"
    """It may have been paid, and nothing says so."""
    SUBMITTED = "submitted"
    """Its task id is known."""
    SUCCESS = "success"
    """There is a picture, and it is not on disk."""
    FAILED = "failed"
    """It ended without a picture."""
    SAVED = "saved"
    """The picture is on disk."""
    REOPENED = "reopened"
    """It was unknown, and its owner will rather pay twice: open again."""
    ABANDONED = "abandoned"
    """It was unknown, and its owner has given it up."""

    @property
    def is_open(self) -> bool:
        """Whether a run submits it."""
        return self in (RowState.OPEN, RowState.REFUSED, RowState.REOPENED)

    @property
    def may_be_submitted(self) -> bool:
        """Whether a submit is in order: for a failed row, when its owner says so."""
        return self.is_open or self is RowState.FAILED


_BEFORE: Final[Mapping[RowState, tuple[RowState, ...]]] = {
    RowState.SUBMITTED: (RowState.INTENT, RowState.UNKNOWN),
    RowState.REFUSED: (RowState.INTENT,),
    RowState.UNKNOWN: (RowState.INTENT, RowState.SUBMITTED),
    RowState.SUCCESS: (RowState.SUBMITTED,),
    RowState.FAILED: (RowState.INTENT, RowState.SUBMITTED),
    RowState.SAVED: (RowState.SUCCESS, RowState.SAVED),
    RowState.REOPENED: (RowState.UNKNOWN,),
    RowState.ABANDONED: (RowState.UNKNOWN,),
}
"""What a state may follow. Nothing else is written, whoever asks: a paid row never becomes an open one by mistake."""
_MAY_COST: Final = (RowState.INTENT, RowState.UNKNOWN, RowState.SUBMITTED, RowState.REOPENED, RowState.ABANDONED)

VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows (
    key TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, stem TEXT NOT NULL UNIQUE COLLATE NOCASE,
    fingerprint TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE attempts (
    key TEXT NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL, sends INTEGER NOT NULL DEFAULT 1, task_id TEXT,
    intended_at REAL NOT NULL, submitted_at REAL, ended_at REAL, saved_at REAL,
    consumed TEXT, reason TEXT, files TEXT NOT NULL DEFAULT '[]', nonce TEXT, PRIMARY KEY (key, attempt)
) WITHOUT ROWID;
"""
SELECT: Final = """
SELECT key, number, stem, fingerprint, prompt, model, coalesce(state, 'open') AS state, coalesce(sends, 0) AS sends,
    task_id, intended_at, submitted_at, ended_at, saved_at, consumed, reason, coalesce(files, '[]') AS files
FROM rows LEFT JOIN attempts USING (key, attempt)
"""
_LAST_OF: Final = "(key, attempt) = (SELECT key, attempt FROM rows WHERE key = ?)"


@attrs.frozen(kw_only=True)
class LedgerRow:
    """One row as the ledger knows it: its last attempt. Times are Unix seconds, None when it has not come to that."""

    key: str
    number: int
    """In the order in which rows were first seen, from 1."""
    stem: str
    """What its files are called, without suffix. No other row has it, in any case."""
    fingerprint: str
    prompt: str
    model: str
    state: RowState = attrs.field(converter=RowState)
    sends: int
    """Times the POST left. More than one: the ones before may have been charged as well."""
    task_id: str | None
    intended_at: float | None
    submitted_at: float | None
    ended_at: float | None
    saved_at: float | None
    consumed: Decimal | None = attrs.field(converter=attrs.converters.optional(Decimal))
    reason: str | None
    files: tuple[SavedImage, ...]


def enter(db: sqlite3.Connection, row: BatchRow) -> sqlite3.Row:
    """Return the line of *row*; enter it as open if it is new, update it if nothing of it is paid and to come."""
    found: sqlite3.Row | None = db.execute(f"{SELECT} WHERE key = ?", (row.key,)).fetchone()
    content = (row.fingerprint, row.request.prompt, row.request.model)
    if found is None:
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
        columns = "key, number, stem, fingerprint, prompt, model"
        values = (row.key, number, _stem(db, row, number), *content)
        db.execute(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
    elif found["fingerprint"] != row.fingerprint and found["state"] in _EDITABLE:
        db.execute("UPDATE rows SET fingerprint = ?, prompt = ?, model = ? WHERE key = ?", (*content, row.key))
    else:
        return found
    entered: sqlite3.Row = db.execute(f"{SELECT} WHERE key = ?", (row.key,)).fetchone()
    return entered


_EDITABLE: Final = (RowState.OPEN, RowState.REFUSED, RowState.FAILED)
"""States in which a row with a key of the user's own may get another prompt: nothing of it is paid and to come."""


def _stem(db: sqlite3.Connection, row: BatchRow, number: int) -> str:
    stem = safe_name(f"{number:04}-{row.request.prompt.lower()}", limit=45) if row.name is None else safe_name(row.name)
    while db.execute("SELECT 1 FROM rows WHERE stem = ?", (stem,)).fetchone():
        stem = f"{stem}-{number}"
    return stem


def intend(db: sqlite3.Connection, key: str, nonce: str | None = None) -> bool:
    """Begin a new attempt; False when the row is not one to submit."""
    state, attempt = db.execute(
        "SELECT coalesce(state, 'open'), attempt FROM rows LEFT JOIN attempts USING (key, attempt) WHERE key = ?",
        (key,),
    ).fetchone()
    if not RowState(state).may_be_submitted:
        return False
    db.execute("UPDATE rows SET attempt = ? WHERE key = ?", (attempt + 1, key))
    db.execute(
        "INSERT INTO attempts (key, attempt, state, intended_at, nonce) VALUES (?, ?, ?, ?, ?)",
        (key, attempt + 1, RowState.INTENT, time.time(), nonce),
    )
    return True


def intend_again(db: sqlite3.Connection, key: str) -> bool:
    """Count one more POST of the attempt that is under way; False when none is."""
    done = db.execute(f"UPDATE attempts SET sends = sends + 1 WHERE {_LAST_OF} AND state = 'intent'", (key,))
    return done.rowcount > 0


def move(db: sqlite3.Connection, key: str, state: RowState, facts: Mapping[str, str | float | None]) -> bool:
    """Put the last attempt of *key* in *state*; False, and nothing done, when it is in none that this may follow."""
    before = _BEFORE[state]
    sets = "".join(f", {name} = ?" for name in facts)
    values = [_clean(value) for value in facts.values()]
    done = db.execute(
        f"UPDATE attempts SET state = ?{sets} WHERE {_LAST_OF} AND state IN ({', '.join('?' * len(before))})",
        (state, *values, key, *before),
    )
    return done.rowcount > 0


def bind(db: sqlite3.Connection, key: str, task_id: str) -> bool:
    """Note which task the last attempt of *key* became, as somebody says; False when it is not unknown.

    Raises:
        ValueError: It cannot be that one: another attempt is.
    """
    other = db.execute(f"SELECT key FROM attempts WHERE task_id = ? AND NOT {_LAST_OF}", (task_id, key)).fetchone()
    if other is not None:
        raise ValueError(f"task {task_id} is what row {other[0]} became")
    return move(db, key, RowState.SUBMITTED, {"task_id": task_id})


def recognise(db: sqlite3.Connection, nonce: str, task_id: str) -> None:
    """Note which task the unknown submit with this nonce became, if it is one, and still the last of its row."""
    db.execute(
        "UPDATE attempts SET state = 'submitted', task_id = ? WHERE nonce = ? AND state = 'unknown'"
        " AND (key, attempt) IN (SELECT key, attempt FROM rows)"
        " AND NOT EXISTS (SELECT 1 FROM attempts AS others WHERE others.task_id = ? AND others.nonce IS NOT ?)",
        (task_id, nonce, task_id, nonce),
    )


def misses(db: sqlite3.Connection, nonce: str) -> bool:
    """Tell whether nobody knows what became of the submit with this nonce."""
    found = db.execute("SELECT 1 FROM attempts WHERE nonce = ? AND state = 'unknown'", (nonce,))
    return found.fetchone() is not None


def _clean(value: str | float | None) -> str | float | None:
    """Return *value* as SQLite takes it: a path in an error may hold bytes that are no text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def cost(line: sqlite3.Row) -> tuple[str, int, Decimal | None]:
    """Return the model, how many submits of an attempt may yet cost something, and what it did cost."""
    consumed = None if line["consumed"] is None else Decimal(line["consumed"])
    state = RowState(line["state"])
    unsettled = state in _MAY_COST or (state in (RowState.SUCCESS, RowState.SAVED) and consumed is None)
    return line["model"], line["sends"] - (not unsettled), consumed


def as_record(line: sqlite3.Row, folder: Path) -> LedgerRow:
    """Return a line of `SELECT` as a record."""
    fields = dict(line)
    files = tuple(
        SavedImage(path=folder / name, sha256=digest, size_bytes=size)
        for name, digest, size in json.loads(fields.pop("files"))
    )
    return LedgerRow(**fields, files=files)
