"""The tables of a ledger, the states of a row, and the allowed transitions. SQL on a given connection."""

import enum
import json
import sqlite3
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Final

import attrs

from nanobanana_async._text import slugify
from nanobanana_async.models import GenerationRequest, SavedImage


@attrs.frozen(kw_only=True)
class BatchRow:
    """One row of a batch: one image to generate."""

    key: str
    """Identifies the row in later runs."""
    request: GenerationRequest
    name: str | None = None
    """File name without suffix; None derives it from the prompt."""
    fingerprint: str
    """Hash of the request. Rows with the same key must have the same one."""


class RowState(enum.StrEnum):
    """State of a row: that of its last attempt, or `READY` if there is none."""

    READY = "ready"
    """Not submitted."""
    SUBMITTING = "submitting"
    """A POST is about to be sent, or was sent."""
    REJECTED = "rejected"
    """The service provably did not accept it. It is ready again."""
    UNKNOWN = "unknown"
    """It may have been charged, but no response confirmed it."""
    SUBMITTED = "submitted"
    """The task id is known."""
    SUCCEEDED = "succeeded"
    """The task has an image, which is not saved yet."""
    FAILED = "failed"
    """It ended without an image."""
    SAVED = "saved"
    """The image is saved."""
    REQUEUED = "requeued"
    """It was unknown, and the user accepts a possible second charge. It is ready again."""
    ABANDONED = "abandoned"
    """It was unknown, and the user has given it up."""

    @property
    def is_ready(self) -> bool:
        """Whether a run submits the row."""
        return self in (RowState.READY, RowState.REJECTED, RowState.REQUEUED)

    @property
    def is_submittable(self) -> bool:
        """Whether the row may be submitted: also if it has failed and the user retries failed rows."""
        return self.is_ready or self is RowState.FAILED


ALLOWED_FROM: Final[Mapping[RowState, tuple[RowState, ...]]] = {
    RowState.SUBMITTED: (RowState.SUBMITTING, RowState.UNKNOWN),
    RowState.REJECTED: (RowState.SUBMITTING,),
    RowState.UNKNOWN: (RowState.SUBMITTING, RowState.SUBMITTED),
    RowState.SUCCEEDED: (RowState.SUBMITTED,),
    RowState.FAILED: (RowState.SUBMITTING, RowState.SUBMITTED),
    RowState.SAVED: (RowState.SUCCEEDED, RowState.SAVED),
    RowState.REQUEUED: (RowState.UNKNOWN,),
    RowState.ABANDONED: (RowState.UNKNOWN,),
}
"""States from which a transition is allowed. Others are never written, so a charged row never becomes ready by mistake.
"""
_POSSIBLY_CHARGED: Final = (
    RowState.SUBMITTING,
    RowState.UNKNOWN,
    RowState.SUBMITTED,
    RowState.REQUEUED,
    RowState.ABANDONED,
)

SCHEMA_VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows (
    key TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, file_stem TEXT NOT NULL UNIQUE COLLATE NOCASE,
    fingerprint TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE attempts (
    key TEXT NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL, submit_count INTEGER NOT NULL DEFAULT 1,
    task_id TEXT, intended_at REAL NOT NULL, submitted_at REAL, ended_at REAL, saved_at REAL,
    consumed TEXT, reason TEXT, files TEXT NOT NULL DEFAULT '[]', nonce TEXT, PRIMARY KEY (key, attempt)
) WITHOUT ROWID;
"""
SELECT_ROWS: Final = """
SELECT key, number, file_stem, fingerprint, prompt, model, coalesce(state, 'ready') AS state,
    coalesce(submit_count, 0) AS submit_count, task_id, intended_at, submitted_at, ended_at, saved_at,
    consumed, reason, coalesce(files, '[]') AS files
FROM rows LEFT JOIN attempts USING (key, attempt)
"""
_CURRENT_ATTEMPT: Final = "(key, attempt) = (SELECT key, attempt FROM rows WHERE key = ?)"


@attrs.frozen(kw_only=True)
class LedgerRow:
    """One row in the ledger, with its last attempt. Times are Unix seconds; None if not reached."""

    key: str
    number: int
    """Position in the order in which rows were first seen, from 1."""
    file_stem: str
    """Name of its files without suffix. Unique in the ledger, ignoring case."""
    fingerprint: str
    prompt: str
    model: str
    state: RowState = attrs.field(converter=RowState)
    submit_count: int
    """Number of POSTs. If more than one, the earlier ones may also have been charged."""
    task_id: str | None
    intended_at: float | None
    submitted_at: float | None
    ended_at: float | None
    saved_at: float | None
    consumed: Decimal | None = attrs.field(converter=attrs.converters.optional(Decimal))
    reason: str | None
    files: tuple[SavedImage, ...]


def upsert_row(db: sqlite3.Connection, row: BatchRow) -> sqlite3.Row:
    """Insert *row* as ready, or update it if no charge is pending. Return its line."""
    found: sqlite3.Row | None = db.execute(f"{SELECT_ROWS} WHERE key = ?", (row.key,)).fetchone()
    content = (row.fingerprint, row.request.prompt, row.request.model)
    if found is None:
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
        columns = "key, number, file_stem, fingerprint, prompt, model"
        values = (row.key, number, _stem(db, row, number), *content)
        db.execute(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
    elif found["fingerprint"] != row.fingerprint and found["state"] in _EDITABLE_STATES:
        db.execute("UPDATE rows SET fingerprint = ?, prompt = ?, model = ? WHERE key = ?", (*content, row.key))
    else:
        return found
    entered: sqlite3.Row = db.execute(f"{SELECT_ROWS} WHERE key = ?", (row.key,)).fetchone()
    return entered


_EDITABLE_STATES: Final = (RowState.READY, RowState.REJECTED, RowState.FAILED)
"""States in which a row with a key of its own may get another prompt, because no charge is pending."""


def _stem(db: sqlite3.Connection, row: BatchRow, number: int) -> str:
    stem = slugify(f"{number:04}-{row.request.prompt.lower()}", limit=45) if row.name is None else slugify(row.name)
    while db.execute("SELECT 1 FROM rows WHERE file_stem = ?", (stem,)).fetchone():
        stem = f"{stem}-{number}"
    return stem


def begin_attempt(db: sqlite3.Connection, key: str, nonce: str | None = None) -> bool:
    """Begin a new attempt. Return False if the row may not be submitted."""
    state, attempt = db.execute(
        "SELECT coalesce(state, 'ready'), attempt FROM rows LEFT JOIN attempts USING (key, attempt) WHERE key = ?",
        (key,),
    ).fetchone()
    if not RowState(state).is_submittable:
        return False
    db.execute("UPDATE rows SET attempt = ? WHERE key = ?", (attempt + 1, key))
    db.execute(
        "INSERT INTO attempts (key, attempt, state, intended_at, nonce) VALUES (?, ?, ?, ?, ?)",
        (key, attempt + 1, RowState.SUBMITTING, time.time(), nonce),
    )
    return True


def count_resubmit(db: sqlite3.Connection, key: str) -> bool:
    """Count one more POST of the current attempt. Return False if there is none."""
    done = db.execute(
        f"UPDATE attempts SET submit_count = submit_count + 1 WHERE {_CURRENT_ATTEMPT} AND state = 'submitting'", (key,)
    )
    return done.rowcount > 0


def transition(db: sqlite3.Connection, key: str, state: RowState, facts: Mapping[str, str | float | None]) -> bool:
    """Set the state of the current attempt of *key*. Return False, without a change, if it is not allowed."""
    before = ALLOWED_FROM[state]
    sets = "".join(f", {name} = ?" for name in facts)
    values = [_storable(value) for value in facts.values()]
    done = db.execute(
        f"UPDATE attempts SET state = ?{sets} WHERE {_CURRENT_ATTEMPT} AND state IN ({', '.join('?' * len(before))})",
        (state, *values, key, *before),
    )
    return done.rowcount > 0


def bind_task(db: sqlite3.Connection, key: str, task_id: str) -> bool:
    """Record the task id of the current attempt of *key*. Return False if its state is not unknown.

    Raises:
        ValueError: Another attempt has this task id.
    """
    other = db.execute(
        f"SELECT key FROM attempts WHERE task_id = ? AND NOT {_CURRENT_ATTEMPT}", (task_id, key)
    ).fetchone()
    if other is not None:
        raise ValueError(f"task {task_id} belongs to row {other[0]}")
    return transition(db, key, RowState.SUBMITTED, {"task_id": task_id})


def bind_by_nonce(db: sqlite3.Connection, nonce: str, task_id: str) -> None:
    """Record the task id of the unknown submit with this nonce, if it is the last attempt of its row."""
    db.execute(
        "UPDATE attempts SET state = 'submitted', task_id = ? WHERE nonce = ? AND state = 'unknown'"
        " AND (key, attempt) IN (SELECT key, attempt FROM rows)"
        " AND NOT EXISTS (SELECT 1 FROM attempts AS others WHERE others.task_id = ? AND others.nonce IS NOT ?)",
        (task_id, nonce, task_id, nonce),
    )


def is_unresolved(db: sqlite3.Connection, nonce: str) -> bool:
    """Return whether the outcome of the submit with this nonce is unknown."""
    found = db.execute("SELECT 1 FROM attempts WHERE nonce = ? AND state = 'unknown'", (nonce,))
    return found.fetchone() is not None


def _storable(value: str | float | None) -> str | float | None:
    """Return *value* in a form that SQLite stores: a path in an error may contain bytes that are not text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def attempt_cost(line: sqlite3.Row) -> tuple[str, int, Decimal | None]:
    """Return the model of an attempt, the number of its submits that may still cost, and the credits charged."""
    consumed = None if line["consumed"] is None else Decimal(line["consumed"])
    state = RowState(line["state"])
    unsettled = state in _POSSIBLY_CHARGED or (state in (RowState.SUCCEEDED, RowState.SAVED) and consumed is None)
    return line["model"], line["submit_count"] - (not unsettled), consumed


def to_ledger_row(line: sqlite3.Row, folder: Path) -> LedgerRow:
    """Return a line of `SELECT_ROWS` as a `LedgerRow`."""
    fields = dict(line)
    files = tuple(
        SavedImage(path=folder / name, sha256=digest, size_bytes=size)
        for name, digest, size in json.loads(fields.pop("files"))
    )
    return LedgerRow(**fields, files=files)
