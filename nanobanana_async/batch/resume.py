"""How rows end, in the words of the public outcomes. Pure, but for a look at the disk."""

from datetime import UTC, datetime

from nanobanana_async.batch.rows import BatchRow
from nanobanana_async.errors import ConfigurationError, NanoBananaError, SubmissionUnknown, TaskFailed
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.models import Task, TaskStatus
from nanobanana_async.outcomes import Failed, Outcome, Unknown


def previous_outcome(row: BatchRow, record: LedgerRow, *, retry_failed: bool) -> Outcome | None:
    """Return what an earlier run has come to, when there is nothing more to do about it."""
    error: NanoBananaError
    if record.fingerprint != row.fingerprint:
        what = f"key {row.key!r} was paid for with another prompt or other options; use a new key"
        return Failed(key=row.key, request=row.request, error=ConfigurationError(what))
    if record.state in (RowState.UNKNOWN, RowState.SUBMITTING):
        unknown = SubmissionUnknown(record.reason or "")
        unknown.task_id = record.task_id
        return Unknown(key=row.key, request=row.request, error=unknown, replayed=True)
    if record.state is RowState.ABANDONED:
        error = SubmissionUnknown(f"given up: {record.reason}")
    elif record.state is RowState.FAILED and not retry_failed:
        error = TaskFailed(record.reason or "it failed in an earlier run", task_id=record.task_id)
    else:
        return None
    return Failed(key=row.key, request=row.request, error=error, replayed=True)


def files_exist(record: LedgerRow) -> bool:
    """Tell whether the pictures of a row are still where they were put. Blocking."""
    return bool(record.files) and all(file.path.is_file() for file in record.files)


def task_from_row(record: LedgerRow) -> Task:
    """Return what the ledger holds of a finished task."""
    return Task(task_id=record.task_id or "", status=TaskStatus.SUCCESS, consumed=record.consumed)


def to_datetime(unix_s: float | None) -> datetime | None:
    """Return a time of the ledger as a date."""
    return None if unix_s is None else datetime.fromtimestamp(unix_s, UTC)
