"""Single tasks in the tables of `ledger.schema`. SQL on a given connection."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, Final

import attrs

from nanobanana_async.ledger import schema
from nanobanana_async.ledger.budget import PricedAs
from nanobanana_async.ledger.schema import AttemptCost, RowState
from nanobanana_async.models import JsonValue, Task, TaskStatus

_DAY_S: Final = 86_400.0

_SELECT_TASKS: Final = """
SELECT key, number, owner, note, prompt, rows.model, rows.image_size, state, task_id, intended_at, submitted_at,
    ended_at, consumed, reason, acknowledged_at,
    (SELECT count(*) FROM attempts AS every WHERE every.key = rows.key AND every.may_be_charged
        AND (every.consumed IS NULL OR CAST(every.consumed AS REAL) > 0)) AS possible_charges
FROM rows JOIN attempts USING (key, attempt)
"""
UNACKNOWLEDGED: Final = "acknowledged_at IS NULL AND task_id IS NOT NULL"
UNRESOLVED: Final = "acknowledged_at IS NULL AND task_id IS NULL AND state = 'unknown'"
_IS_OUTSTANDING: Final = "acknowledged_at IS NULL AND (task_id IS NOT NULL OR state IN ('unknown', 'submitting'))"
# What was never acknowledged is kept for good, and so is what may have been charged an amount that is not known.
_PRUNABLE: Final = """
SELECT key FROM rows JOIN attempts USING (key, attempt)
WHERE (acknowledged_at < :before OR (task_id IS NULL AND state NOT IN ('unknown', 'submitting')))
    AND intended_at < :before
    AND NOT EXISTS (SELECT 1 FROM attempts AS every WHERE every.key = rows.key AND every.may_be_charged
        AND every.consumed IS NULL)
"""
_SELECT_COSTS: Final = """
SELECT attempts.model, attempts.image_size, may_be_charged, consumed, state = 'succeeded' AS is_success,
    state IN ('submitting', 'submitted') AND acknowledged_at IS NULL AS is_open, count(*) AS count
FROM rows JOIN attempts USING (key) WHERE (:owner IS NULL OR owner = :owner) AND intended_at >= :since
GROUP BY 1, 2, 3, 4, 5, 6
"""
_SELECT_PRUNED: Final = "SELECT spent FROM pruned WHERE (:owner IS NULL OR owner = :owner) AND day >= :since"
_SELECT_PRICES: Final = """
SELECT DISTINCT model, image_size, consumed FROM attempts WHERE state = 'succeeded' AND consumed IS NOT NULL
"""
_SELECT_CHARGES: Final = """
SELECT owner, intended_at, consumed FROM rows JOIN attempts USING (key) WHERE key = ? AND consumed IS NOT NULL
"""


@attrs.frozen(kw_only=True)
class LedgerTask:
    """One single task in a ledger, with its last attempt. Times are Unix seconds; None if not reached.

    Attributes:
        key: Identifies the call.
        number: Position in its file, from 1.
        owner: Whom the task is for.
        note: What the application has passed as `note`.
        prompt: Empty with `SqliteLedger(store_requests=False)`.
        model: Model of the request.
        image_size: Image size of the request; None leaves it to the service.
        state: State of the last attempt.
        task_id: Identifier of the task; None if it is not known.
        intended_at: When the POST was about to be sent.
        submitted_at: When it was accepted.
        ended_at: When it was final.
        consumed: Credits charged for the last attempt; None if the service has not stated them.
        reason: Why there is no image; None if there is one, or nothing is known.
        acknowledged_at: When the application has used the result.
        possible_charges: POSTs that were or may have been charged. More than one means possible duplicates.
    """

    key: str
    number: int
    owner: str | None
    note: JsonValue
    prompt: str
    model: str
    image_size: str | None
    state: RowState
    task_id: str | None
    intended_at: float
    submitted_at: float | None
    ended_at: float | None
    consumed: Decimal | None
    reason: str | None
    acknowledged_at: float | None
    possible_charges: int

    @property
    def snapshot(self) -> Task | None:
        """The final task, as far as the ledger stores it; None if no end is recorded."""
        if self.task_id is None or self.state not in (RowState.SUCCEEDED, RowState.FAILED):
            return None
        status = TaskStatus.SUCCESS if self.state is RowState.SUCCEEDED else TaskStatus.FAILED
        return Task(task_id=self.task_id, status=status, consumed=self.consumed, reason=self.reason)


@attrs.frozen(kw_only=True)
class NewTask:
    """A single task that is about to be submitted."""

    key: str
    owner: str | None
    note: str | None
    """JSON."""
    prompt: str
    priced_as: PricedAs


def insert_task(db: sqlite3.Connection, task: NewTask, nonce: str | None) -> None:
    """Insert *task* with its first attempt."""
    number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rows").fetchone()[0]
    columns = "key, number, file_stem, fingerprint, prompt, model, image_size, owner, note"
    values = (task.key, number, task.key, "", task.prompt, *task.priced_as, task.owner, task.note)
    db.execute(f"INSERT INTO rows ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    schema.begin_attempt(db, task.key, resubmit=False, nonce=nonce)


def acknowledge(db: sqlite3.Connection, key: str) -> None:
    """Record that the application has used the result of *key*, or knows that there is none."""
    db.execute("UPDATE rows SET acknowledged_at = ? WHERE key = ? AND acknowledged_at IS NULL", (time.time(), key))


def select(db: sqlite3.Connection, where: str = "true") -> list[LedgerTask]:
    """Return the tasks of which *where* is true, oldest first."""
    return [_to_task(line) for line in db.execute(f"{_SELECT_TASKS} WHERE {where} ORDER BY number")]


def in_order(found: Iterable[list[LedgerTask]]) -> list[LedgerTask]:
    """Return the tasks of several files in the order of their submits."""
    return sorted((task for listed in found for task in listed), key=lambda task: task.intended_at)


def find(db: sqlite3.Connection, name: str) -> LedgerTask | None:
    """Return the task with this task id or key; None if it is not in this file."""
    found = db.execute(f"{_SELECT_TASKS} WHERE task_id = :name OR key = :name", {"name": name}).fetchone()
    return None if found is None else _to_task(found)


def expects_acknowledgement(db: sqlite3.Connection) -> bool:
    """Return whether a task or an unresolved attempt is not acknowledged."""
    return db.execute(f"{_SELECT_TASKS} WHERE {_IS_OUTSTANDING} LIMIT 1").fetchone() is not None


def costs(db: sqlite3.Connection, owner: str | None = None, since: float = 0.0) -> list[AttemptCost]:
    """Return what the attempts of *owner* since a time say about money; of all owners if None."""
    found = db.execute(_SELECT_COSTS, {"owner": owner, "since": since})
    pruned = db.execute(_SELECT_PRUNED, {"owner": owner, "since": since / _DAY_S})
    return [*map(_to_cost, found), *map(_to_pruned_cost, pruned)]


def prices(db: sqlite3.Connection) -> Iterator[tuple[PricedAs, Decimal]]:
    """Yield what tasks with an image were charged, each amount once."""
    for line in db.execute(_SELECT_PRICES):
        yield (line["model"], line["image_size"]), Decimal(line["consumed"])


def prune(db: sqlite3.Connection, before: float) -> None:
    """Delete tasks that were acknowledged before a time, and submits that were not charged. Sums per owner are kept."""
    keys = [line["key"] for line in db.execute(_PRUNABLE, {"before": before})]
    for key in keys:
        for line in db.execute(_SELECT_CHARGES, (key,)).fetchall():
            _add_pruned(db, line["owner"] or "", int(line["intended_at"] // _DAY_S), Decimal(line["consumed"]))
        db.execute("DELETE FROM attempts WHERE key = ?", (key,))
        db.execute("DELETE FROM rows WHERE key = ?", (key,))


def _add_pruned(db: sqlite3.Connection, owner: str, day: int, spent: Decimal) -> None:
    found = db.execute("SELECT spent FROM pruned WHERE owner = ? AND day = ?", (owner, day)).fetchone()
    total = spent if found is None else spent + Decimal(found["spent"])
    db.execute("INSERT OR REPLACE INTO pruned VALUES (?, ?, ?)", (owner, day, f"{total:f}"))


def _to_cost(line: sqlite3.Row) -> AttemptCost:
    return attrs.evolve(schema.to_attempt_cost(line), count=line["count"], is_open=bool(line["is_open"]))


def _to_pruned_cost(line: sqlite3.Row) -> AttemptCost:
    spent = Decimal(line["spent"])
    return AttemptCost(model="", image_size=None, may_be_charged=True, consumed=spent, is_success=False)


def _to_task(line: sqlite3.Row) -> LedgerTask:
    fields = dict[str, Any](line)
    note, state, consumed = fields.pop("note"), fields.pop("state"), fields.pop("consumed")
    return LedgerTask(
        **fields,
        state=RowState(state),
        note=None if note is None else json.loads(note),
        consumed=None if consumed is None else Decimal(consumed),
    )
