"""The tables of a ledger, the states of a row, and the allowed transitions. SQL on a given connection."""

import enum
import json
import sqlite3
import time
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Final, TypeAlias

import attrs

from nanobanana_async._text import slugify
from nanobanana_async.errors import SubmissionUnknown
from nanobanana_async.models import GenerationRequest, SavedImage
from nanobanana_async.protocols import AttemptEnd, Verdict


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

_Value: TypeAlias = str | float | None

SCHEMA_VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows (
    key TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, file_stem TEXT NOT NULL UNIQUE COLLATE NOCASE,
    fingerprint TEXT NOT NULL, prompt TEXT NOT NULL, model TEXT NOT NULL, image_size TEXT,
    attempt INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE attempts (
    key TEXT NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL, may_be_charged INTEGER NOT NULL DEFAULT 1,
    is_doubtful INTEGER NOT NULL DEFAULT 0, rule TEXT, nonce TEXT, task_id TEXT, model TEXT NOT NULL, image_size TEXT,
    intended_at REAL NOT NULL, submitted_at REAL, ended_at REAL, saved_at REAL,
    consumed TEXT, reason TEXT, files TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (key, attempt)
) WITHOUT ROWID;
"""
# One attempt is one POST. An attempt whose charge the service has stated as zero was not charged.
SELECT_ROWS: Final = """
SELECT key, number, file_stem, fingerprint, prompt, rows.model, rows.image_size, attempt,
    coalesce(state, 'ready') AS state,
    task_id, intended_at, submitted_at, ended_at, saved_at, consumed, reason, coalesce(files, '[]') AS files,
    (SELECT count(*) FROM attempts AS every WHERE every.key = rows.key AND every.may_be_charged
        AND (every.consumed IS NULL OR CAST(every.consumed AS REAL) > 0)) AS possible_charges,
    (SELECT count(*) FROM attempts AS every WHERE every.key = rows.key AND every.may_be_charged
        AND every.consumed IS NULL) AS held_charges,
    EXISTS (SELECT 1 FROM attempts AS every WHERE every.key = rows.key AND every.is_doubtful) AS is_doubted
FROM rows LEFT JOIN attempts USING (key, attempt)
"""
SELECT_COSTS: Final = """
SELECT model, image_size, may_be_charged, consumed, state IN ('succeeded', 'saved') AS is_success FROM attempts
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
    image_size: str | None
    attempt: int
    """Number of POSTs in all runs."""
    state: RowState = attrs.field(converter=RowState)
    possible_charges: int
    """POSTs in all runs that were or may have been charged. More than one means possible duplicates."""
    held_charges: int
    """Those of `possible_charges` for which the service has not stated an amount."""
    is_doubted: bool = attrs.field(converter=bool)
    """Whether a POST got a response that does not prove that nothing was charged."""
    task_id: str | None
    intended_at: float | None
    submitted_at: float | None
    ended_at: float | None
    saved_at: float | None
    consumed: Decimal | None = attrs.field(converter=attrs.converters.optional(Decimal))
    """Credits charged for the last attempt."""
    reason: str | None
    files: tuple[SavedImage, ...]

    @property
    def possible_duplicates(self) -> int:
        """POSTs beyond the first that were or may have been charged, in all runs."""
        return max(0, self.possible_charges - 1)


@attrs.frozen(kw_only=True)
class AttemptCost:
    """What one attempt of any run says about money."""

    model: str
    image_size: str | None
    may_be_charged: bool
    consumed: Decimal | None
    is_success: bool
    """Whether the task has an image, so that its price is the price of its model and size."""


def upsert_row(db: sqlite3.Connection, row: BatchRow, image_stems: frozenset[str]) -> sqlite3.Row:
    """Insert *row* as ready, or update it if no charge is pending. Return its line.

    A new row whose image exists (*image_stems*) was charged before the ledger was lost. It is inserted as unknown if
    the ledger has been adopted since.

    Raises:
        ValueError: The image of a new row exists, and the ledger was not adopted.
    """
    found = _find_row(db, row.key)
    content = (row.fingerprint, row.request.prompt, row.request.model, row.request.image_size)
    if found is None:
        number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
        columns = "key, number, file_stem, fingerprint, prompt, model, image_size"
        stem = _stem(db, row, number)
        is_restored = _is_restored(db, stem, image_stems)
        db.execute(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", (row.key, number, stem, *content))
        if is_restored:
            add_restored_attempt(db, row.key, RowState.UNKNOWN)
    elif found["fingerprint"] != row.fingerprint and found["state"] in _EDITABLE_STATES:
        update = "UPDATE rows SET fingerprint = ?, prompt = ?, model = ?, image_size = ? WHERE key = ?"
        db.execute(update, (*content, row.key))
    else:
        return found
    entered: sqlite3.Row = db.execute(f"{SELECT_ROWS} WHERE key = ?", (row.key,)).fetchone()
    return entered


def _is_restored(db: sqlite3.Connection, stem: str, image_stems: frozenset[str]) -> bool:
    """Return whether a new row may have been submitted before the ledger was restored and adopted."""
    meta = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('adopted', 'lost')").fetchall())
    if stem.lower() in image_stems and stem.lower() not in json.loads(meta.get("adopted", "[]")):
        raise ValueError(f"the image {stem} exists, and the ledger has no submit of it. Use another folder")
    return bool(meta.get("lost")) or stem.lower() in image_stems


def add_restored_attempt(db: sqlite3.Connection, key: str, state: RowState, task_id: str | None = None) -> None:
    """Add an attempt that was made, and whose record was lost."""
    db.execute("UPDATE rows SET attempt = attempt + 1 WHERE key = ?", (key,))
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'attempts'")
    db.execute(
        "INSERT INTO attempts (key, attempt, model, image_size, state, task_id, intended_at, reason)"
        " SELECT key, attempt, model, image_size, ?, ?, ?, ? FROM rows WHERE key = ?",
        (state, task_id, time.time(), _RESTORED_REASON, key),
    )


_RESTORED_REASON: Final = "the ledger was restored, and the row may have been submitted after the backup"
_EDITABLE_STATES: Final = (RowState.READY, RowState.REJECTED, RowState.FAILED)
"""States in which a row with a key of its own may get another prompt, because no charge is pending."""


def _find_row(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    found: sqlite3.Row | None = db.execute(f"{SELECT_ROWS} WHERE key = ?", (key,)).fetchone()
    return found


def _stem(db: sqlite3.Connection, row: BatchRow, number: int) -> str:
    stem = slugify(f"{number:04}-{row.request.prompt.lower()}", limit=45) if row.name is None else slugify(row.name)
    while db.execute("SELECT 1 FROM rows WHERE file_stem = ?", (stem,)).fetchone():
        stem = f"{stem}-{number}"
    return stem


def begin_attempt(db: sqlite3.Connection, key: str, *, resubmit: bool, nonce: str | None) -> bool:
    """Begin a new attempt. Return False if the row may not be submitted.

    With *resubmit* it may follow an attempt of this run that may have been charged.
    """
    row = _find_row(db, key)
    if row is None:
        return False
    state = RowState(row["state"])
    if resubmit and state is RowState.UNKNOWN:
        transition(db, key, RowState.REQUEUED, {})
    elif not state.is_submittable:
        return False
    attempt = row["attempt"] + 1
    db.execute("UPDATE rows SET attempt = ? WHERE key = ?", (attempt, key))
    db.execute(
        "INSERT INTO attempts (key, attempt, model, image_size, state, intended_at, nonce)"
        " SELECT key, attempt, model, image_size, ?, ?, ? FROM rows WHERE key = ?",
        (RowState.SUBMITTING, time.time(), nonce, key),
    )
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'attempts'")
    return True


def end_attempt(db: sqlite3.Connection, key: str, end: AttemptEnd) -> bool:
    """Record the end of the current attempt of *key*. Return False if it has another end."""
    now, reason = time.time(), None if end.error is None else str(end.error)
    about: dict[str, _Value] = {"rule": end.rule, "is_doubtful": end.is_doubtful}
    if end.verdict is Verdict.ACCEPTED:
        row = _find_row(db, key)
        if row is not None and row["task_id"] == end.task_id:
            return True  # a callback was faster
        return transition(db, key, RowState.SUBMITTED, {**about, "task_id": end.task_id, "submitted_at": now})
    about["may_be_charged"] = end.verdict is Verdict.UNKNOWN
    if isinstance(end.error, SubmissionUnknown):  # this attempt, or an earlier one of the same submit
        return transition(db, key, RowState.UNKNOWN, {**about, "reason": reason})
    state = RowState.FAILED if end.verdict is Verdict.REJECTED else RowState.REJECTED
    return transition(db, key, state, {**about, "reason": reason, "ended_at": now})


def transition(db: sqlite3.Connection, key: str, state: RowState, facts: Mapping[str, _Value]) -> bool:
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
    return transition(db, key, RowState.SUBMITTED, {"task_id": task_id, "may_be_charged": True})


def bind_by_nonce(db: sqlite3.Connection, nonce: str, task_id: str) -> None:
    """Record the task id of the unknown submit with this nonce, if it is the last attempt of its row."""
    db.execute(
        "UPDATE attempts SET state = 'submitted', task_id = ?, may_be_charged = 1 WHERE nonce = ? AND state = 'unknown'"
        " AND (key, attempt) IN (SELECT key, attempt FROM rows)"
        " AND NOT EXISTS (SELECT 1 FROM attempts AS others WHERE others.task_id = ? AND others.nonce IS NOT ?)",
        (task_id, nonce, task_id, nonce),
    )


def is_unresolved(db: sqlite3.Connection, nonce: str) -> bool:
    """Return whether the outcome of the submit with this nonce is unknown."""
    found = db.execute("SELECT 1 FROM attempts WHERE nonce = ? AND state = 'unknown'", (nonce,))
    return found.fetchone() is not None


@attrs.frozen
class ServiceIdentity:
    """The service and the account that a ledger is about."""

    base_url: str
    account: str
    """A digest of the key."""
    last_task_id: str | None
    """The task that was submitted last; None if there is none."""


def service(db: sqlite3.Connection) -> ServiceIdentity | None:
    """Return the service that the ledger is about; None if it is not recorded."""
    meta = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('base_url', 'account')").fetchall())
    last = db.execute("SELECT task_id FROM attempts WHERE task_id IS NOT NULL ORDER BY submitted_at DESC LIMIT 1")
    return ServiceIdentity(**meta, last_task_id=next((line[0] for line in last), None)) if meta else None


def set_service(db: sqlite3.Connection, base_url: str, account: str) -> None:
    """Record base URL and account of the service."""
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", [("base_url", base_url), ("account", account)])


def _storable(value: _Value) -> _Value:
    """Return *value* in a form that SQLite stores: a path in an error may contain bytes that are not text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def to_attempt_cost(line: sqlite3.Row) -> AttemptCost:
    """Return a line of `SELECT_COSTS` as an `AttemptCost`."""
    return AttemptCost(
        model=line["model"],
        image_size=line["image_size"],
        may_be_charged=bool(line["may_be_charged"]),
        consumed=None if line["consumed"] is None else Decimal(line["consumed"]),
        is_success=bool(line["is_success"]),
    )


def to_ledger_row(line: sqlite3.Row, folder: Path) -> LedgerRow:
    """Return a line of `SELECT_ROWS` as a `LedgerRow`."""
    fields = dict(line)
    files = tuple(
        SavedImage(path=folder / name, sha256=digest, size_bytes=size)
        for name, digest, size in json.loads(fields.pop("files"))
    )
    return LedgerRow(**fields, files=files)
