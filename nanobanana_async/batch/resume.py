"""Outcomes of earlier runs. Pure, except for checking that files exist."""

from datetime import UTC, datetime

from nanobanana_async.errors import ConfigurationError, NanoBananaError, SubmissionUnknown, TaskFailed
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.models import Task, TaskStatus
from nanobanana_async.outcomes import Failed, Outcome, Unknown


def previous_outcome(row: BatchRow, record: LedgerRow, *, retry_failed: bool) -> Outcome | None:
    """Return the outcome of an earlier run if the row needs nothing more, else None."""
    error: NanoBananaError
    if record.fingerprint != row.fingerprint:
        what = f"key {row.key!r}: was charged for another prompt or other options. Use a new key."
        return Failed(key=row.key, request=row.request, error=ConfigurationError(what))
    if record.state in (RowState.UNKNOWN, RowState.SUBMITTING):
        unknown = SubmissionUnknown(record.reason or "")
        unknown.task_id = record.task_id
        return Unknown(key=row.key, request=row.request, error=unknown, replayed=True)
    if record.state is RowState.ABANDONED:
        error = SubmissionUnknown(f"abandoned: {record.reason}")
    elif record.state is RowState.FAILED and not retry_failed:
        error = TaskFailed(record.reason or "the task failed in an earlier run", task_id=record.task_id)
    else:
        return None
    return Failed(key=row.key, request=row.request, error=error, replayed=True)


def files_exist(record: LedgerRow) -> bool:
    """Return whether the files of a row still exist. Blocking."""
    return bool(record.files) and all(file.path.is_file() for file in record.files)


def task_from_row(record: LedgerRow) -> Task:
    """Return the finished task, as far as the ledger stores it."""
    return Task(task_id=record.task_id or "", status=TaskStatus.SUCCESS, consumed=record.consumed)


def to_datetime(unix_s: float | None) -> datetime | None:
    """Return a time in the ledger as datetime."""
    return None if unix_s is None else datetime.fromtimestamp(unix_s, UTC)
