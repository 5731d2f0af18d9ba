"""The tables of a ledger, the states of a row, and the allowed transitions. SQL on a given connection."""

import enum
import sqlite3
import time
from collections.abc import Mapping
from decimal import Decimal
from typing import Final, TypeAlias

import attrs

from nanobanana_async.errors import SubmissionUnknown
from nanobanana_async.models import GenerationRequest, JsonValue, ReasonKind, Task
from nanobanana_async.protocols import AttemptEnd, Verdict
from nanobanana_async.saved import SavedImage


@attrs.frozen(kw_only=True)
class BatchRow:
    """One row of a batch: one image to generate.

    Attributes:
        key: Identifies the row in later runs.
        request: What to generate.
        name: File name without suffix; None derives it from the prompt.
        fingerprint: Hash of the request. Rows with the same key must have the same one. "" lets the batch
            compute it.
        line: Line in the file that it was read from.
        columns: All columns of the row in that file, in order, for the results.
    """

    key: str
    request: GenerationRequest
    name: str | None = None
    fingerprint: str = ""
    line: int | None = None
    columns: Mapping[str, JsonValue] = attrs.field(factory=dict[str, JsonValue])


class RowState(enum.StrEnum):
    """State of a row: that of its last attempt, or `READY` if there is none.

    Attributes:
        READY: Not submitted.
        SUBMITTING: A POST is about to be sent, or was sent.
        REJECTED: The service provably did not accept it. It is ready again.
        UNKNOWN: It may have been charged, but no response confirmed it.
        SUBMITTED: The task id is known.
        SUCCEEDED: The task has an image, which is not saved yet.
        FAILED: It ended without an image.
        SAVED: The image is saved.
        REQUEUED: It was unknown, and the user accepts a possible second charge. It is ready again.
        ABANDONED: It was unknown, and the user has given it up.
    """

    READY = "ready"
    SUBMITTING = "submitting"
    REJECTED = "rejected"
    UNKNOWN = "unknown"
    SUBMITTED = "submitted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SAVED = "saved"
    REQUEUED = "requeued"
    ABANDONED = "abandoned"

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
    attempt INTEGER NOT NULL DEFAULT 0, line INTEGER, columns TEXT, listing INTEGER,
    owner TEXT, note TEXT, acknowledged_at REAL
) WITHOUT ROWID;
CREATE INDEX rows_owner ON rows (owner) WHERE owner IS NOT NULL;
CREATE TABLE attempts (
    key TEXT NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL, may_be_charged INTEGER NOT NULL DEFAULT 1,
    is_doubtful INTEGER NOT NULL DEFAULT 0, is_replaced INTEGER NOT NULL DEFAULT 0,
    rule TEXT, nonce TEXT, task_id TEXT, model TEXT NOT NULL, image_size TEXT,
    intended_at REAL NOT NULL, submitted_at REAL, ended_at REAL, saved_at REAL,
    consumed TEXT, reason TEXT, reason_kind TEXT, files TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (key, attempt)
) WITHOUT ROWID;
CREATE INDEX attempts_task ON attempts (task_id) WHERE task_id IS NOT NULL;
CREATE TABLE pruned (owner TEXT NOT NULL, day INTEGER NOT NULL, spent TEXT NOT NULL, PRIMARY KEY (owner, day))
WITHOUT ROWID;
"""
# `owner`, `note`, `acknowledged_at` and the table `pruned` are for single tasks (`ledger.tasks`), `line`, `columns` and
# `listing` for batches. `listing` is the last run with the row in its file. One attempt is one POST. An attempt whose
# charge the service has stated as zero was not charged.
SELECT_ROWS: Final = """
SELECT key, number, file_stem, fingerprint, prompt, rows.model, rows.image_size, line, columns, listing,
    coalesce(state, 'ready') AS state,
    task_id, intended_at, submitted_at, ended_at, saved_at, consumed, reason, reason_kind,
    coalesce(files, '[]') AS files,
    (SELECT count(*) FROM attempts AS every WHERE every.key = rows.key) AS attempt,
    (SELECT group_concat(consumed) FROM attempts AS every WHERE every.key = rows.key) AS charges,
    (SELECT count(*) FROM attempts AS every WHERE every.key = rows.key AND every.may_be_charged
        AND (every.consumed IS NULL OR CAST(every.consumed AS REAL) > 0)
        AND (every.attempt = rows.attempt OR NOT every.is_replaced)) AS possible_charges,
    (SELECT count(*) FROM attempts AS every WHERE every.key = rows.key AND every.may_be_charged
        AND every.consumed IS NULL) AS held_charges,
    EXISTS (SELECT 1 FROM attempts AS every WHERE every.key = rows.key AND every.is_doubtful) AS is_doubted
FROM rows LEFT JOIN attempts USING (key, attempt)
"""
SELECT_COSTS: Final = """
SELECT model, image_size, may_be_charged, consumed, state IN ('succeeded', 'saved') AS is_success, count(*) AS count
FROM attempts GROUP BY 1, 2, 3, 4, 5
"""
_SELECT_CURRENT: Final = """
SELECT coalesce(state, 'ready') AS state, task_id FROM rows LEFT JOIN attempts USING (key, attempt)
WHERE key = ?
"""
# Also after a decision of the user: a charged image that comes late is better than none.
_SELECT_UNRESOLVED: Final = """
SELECT key, attempts.attempt, attempts.attempt = rows.attempt AS is_last FROM attempts JOIN rows USING (key)
WHERE nonce = ? AND task_id IS NULL AND may_be_charged AND state IN ('unknown', 'requeued', 'abandoned')
"""
NEXT_ATTEMPT: Final = """
UPDATE rows SET attempt = (SELECT coalesce(max(attempt), 0) + 1 FROM attempts WHERE attempts.key = rows.key)
WHERE key = ?
"""
"""An earlier attempt than the last may be the one that the row is about, see `keep_attempt`."""
_CURRENT_ATTEMPT: Final = "(key, attempt) = (SELECT key, attempt FROM rows WHERE key = ?)"


@attrs.frozen(kw_only=True)
class LedgerRow:
    """One row in the ledger, with its last attempt. Times are Unix seconds; None if not reached.

    Attributes:
        key: Identifies the row in all runs.
        number: Position in the order in which rows were first seen, from 1.
        file_stem: Name of its files without suffix. Unique in the ledger, ignoring case.
        fingerprint: Hash of the request.
        prompt: Text of the request.
        model: Model of the request.
        image_size: Image size of the request; None leaves it to the service.
        attempt: Number of POSTs in all runs.
        charges: What the service has stated for each of them, as text with commas; None if nothing.
        state: State of the row.
        possible_charges: POSTs in all runs that were or may have been charged, without those that were followed
            by another one on purpose (see `RegeneratePolicy`). More than one means possible duplicates.
        held_charges: Those of `possible_charges` for which the service has not stated an amount.
        is_doubted: Whether a POST got a response that does not prove that nothing was charged.
        task_id: Task of the last attempt; None if it is not known.
        intended_at: When its POST was about to be sent.
        submitted_at: When it was accepted.
        ended_at: When its task was final.
        saved_at: When its image was saved.
        consumed: Credits charged for the last attempt.
        reason: Why there is no image; None if there is one, or nothing is known.
        reason_kind: Why the task had no image, by its words; None as for `reason`, or if there was no task.
        files: Saved images.
        line: Line in the file that it was read from last.
        columns: All columns of the row in that file, in order.
    """

    key: str
    number: int
    file_stem: str
    fingerprint: str
    prompt: str
    model: str
    image_size: str | None
    attempt: int
    charges: str | None
    state: RowState = attrs.field(converter=RowState)
    possible_charges: int
    held_charges: int
    is_doubted: bool = attrs.field(converter=bool)
    task_id: str | None
    intended_at: float | None
    submitted_at: float | None
    ended_at: float | None
    saved_at: float | None
    consumed: Decimal | None = attrs.field(converter=attrs.converters.optional(Decimal))
    reason: str | None
    reason_kind: ReasonKind | None = attrs.field(converter=attrs.converters.optional(ReasonKind))
    files: tuple[SavedImage, ...]
    line: int | None
    columns: Mapping[str, JsonValue]

    @property
    def total_consumed(self) -> Decimal | None:
        """Credits that the service has stated for all POSTs, in all runs; None if for none."""
        return None if self.charges is None else sum(map(Decimal, self.charges.split(",")), Decimal(0))

    @property
    def possible_duplicates(self) -> int:
        """POSTs beyond the first that were or may have been charged, in all runs, unless each was asked for."""
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
    count: int = 1
    """Number of attempts that this is true of."""
    is_open: bool = False
    """Whether an end is still expected."""


def find_row(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    """Return the line of *key*, or None."""
    found: sqlite3.Row | None = db.execute(f"{SELECT_ROWS} WHERE key = ?", (key,)).fetchone()
    return found


def _find_attempt(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    """Return state and task id of the current attempt of *key*; None if there is no such row."""
    found: sqlite3.Row | None = db.execute(_SELECT_CURRENT, (key,)).fetchone()
    return found


def begin_attempt(
    db: sqlite3.Connection, key: str, *, resubmit: bool, nonce: str | None, is_again: bool = False
) -> bool:
    """Begin a new attempt. Return False if the row may not be submitted.

    With *resubmit* it may follow an attempt of this run that may have been charged, and with *is_again* one that has an
    image (see `RegeneratePolicy`).
    """
    row = _find_attempt(db, key)
    if row is None:
        return False
    state = RowState(row["state"])
    if resubmit and state is RowState.UNKNOWN:
        transition(db, key, RowState.REQUEUED, {})
    elif not (state.is_submittable or (is_again and state is RowState.SAVED)):
        return False
    if is_again:
        db.execute("UPDATE attempts SET is_replaced = 1 WHERE key = ? AND task_id IS NOT NULL", (key,))
    db.execute(NEXT_ATTEMPT, (key,))
    db.execute(
        "INSERT INTO attempts (key, attempt, model, image_size, state, intended_at, nonce)"
        " SELECT key, attempt, model, image_size, ?, ?, ? FROM rows WHERE key = ?",
        (RowState.SUBMITTING, time.time(), nonce, key),
    )
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'attempts'")
    return True


def end_attempt(db: sqlite3.Connection, key: str, end: AttemptEnd, *, is_again: bool = False) -> bool:
    """Record the end of the current attempt of *key*. Return False if it has another end.

    An attempt with *is_again* follows another charged one. If it was not charged, the row is about the other one again:
    a later run does not charge it again.
    """
    now, reason = time.time(), None if end.error is None else str(end.error)
    about: dict[str, _Value] = {"rule": end.rule, "is_doubtful": end.is_doubtful}
    if end.verdict is Verdict.ACCEPTED:
        row = _find_attempt(db, key)
        if row is not None and row["task_id"] == end.task_id:
            return True  # a callback was faster
        return transition(db, key, RowState.SUBMITTED, {**about, "task_id": end.task_id, "submitted_at": now})
    about["may_be_charged"] = end.verdict is Verdict.UNKNOWN
    if isinstance(end.error, SubmissionUnknown):  # this attempt, or an earlier one of the same submit
        return transition(db, key, RowState.UNKNOWN, {**about, "reason": reason})
    state = RowState.FAILED if end.verdict is Verdict.REJECTED else RowState.REJECTED
    done = transition(db, key, state, {**about, "reason": reason, "ended_at": now})
    if is_again:
        _fall_back(db, key, RowState.SAVED, RowState.FAILED)
    return done


def record_final(db: sqlite3.Connection, key: str, task: Task, reason_kind: ReasonKind | None = None) -> bool:
    """Record the end of the task of *key*. Return False if its state does not allow it."""
    state = RowState.SUCCEEDED if task.images else RowState.FAILED
    consumed = None if task.consumed is None else f"{task.consumed:f}"
    reason = None if task.images else (task.reason or " ".join(task.texts) or "the service gave no reason")
    facts = {"ended_at": time.time(), "consumed": consumed, "reason": reason, "reason_kind": reason_kind}
    done = transition(db, key, state, facts)
    if state is RowState.FAILED:
        _fall_back(db, key, RowState.SAVED)
    return done


def _fall_back(db: sqlite3.Connection, key: str, *states: RowState) -> None:
    """Let the row *key* be about its last attempt whose task has ended in one of *states*, the first that occurs.

    Its last attempt has no image, and is not expected to get one.
    """
    for state in states:
        found = db.execute(
            "SELECT max(attempt) FROM attempts WHERE key = ? AND state = ? AND task_id IS NOT NULL", (key, state)
        ).fetchone()[0]
        if found is not None:
            db.execute(
                "UPDATE attempts SET is_replaced = attempt != ? WHERE key = ? AND task_id IS NOT NULL", (found, key)
            )
            db.execute("UPDATE rows SET attempt = ? WHERE key = ?", (found, key))
            return


def abandon(db: sqlite3.Connection, key: str) -> bool:
    """Give the unknown row *key* up. It keeps the image of an earlier attempt, if there is one."""
    done = transition(db, key, RowState.ABANDONED, {})
    if done:
        _fall_back(db, key, RowState.SAVED)
    return done


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


def bind_by_nonce(db: sqlite3.Connection, nonce: str, task_id: str) -> str | None:
    """Record the task id of a POST with this nonce that may have been charged. Return the key of its row, or None.

    The last attempt of a row is then submitted. An earlier one is a duplicate, whose id is kept.
    """
    is_known = "SELECT 1 FROM attempts WHERE task_id = ? OR (nonce = ? AND state = 'submitting')"
    if db.execute(is_known, (task_id, nonce)).fetchone() is not None:  # a POST in flight may have this task
        return None
    found = db.execute(f"{_SELECT_UNRESOLVED} ORDER BY is_last DESC, attempts.attempt LIMIT 1", (nonce,)).fetchone()
    if found is None:
        return None
    facts = "state = 'submitted', may_be_charged = 1, task_id = ?" if found["is_last"] else "task_id = ?"
    db.execute(f"UPDATE attempts SET {facts} WHERE key = ? AND attempt = ?", (task_id, found["key"], found["attempt"]))
    return str(found["key"])


def is_unresolved(db: sqlite3.Connection, nonce: str) -> bool:
    """Return whether a POST with this nonce may have been charged, and its task id is not known."""
    return db.execute(f"{_SELECT_UNRESOLVED} LIMIT 1", (nonce,)).fetchone() is not None


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
        count=line["count"],
    )
