"""What earlier runs have left: the service they were about, and the outcomes of rows."""

from datetime import UTC, datetime

from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    ConfigurationError,
    InvalidRequest,
    KeyConflict,
    NanoBananaError,
    SubmissionUnknown,
    TaskNotFound,
)
from nanobanana_async.handle import no_image_error
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.models import ReasonKind, Task, TaskStatus
from nanobanana_async.outcomes import Failed, Outcome, Unknown


async def check_service(ledger: BatchLedger, client: NanoBananaClient, *, new_account: bool) -> None:
    """Check that *client* uses the service and the account that the ledger is about, and record a new account.

    Charged tasks cannot be found elsewhere. A key that differs is usually a rotated one: a query of a known task tells.

    Raises:
        ConfigurationError: It does not.
    """
    found, account = await ledger.service(), client.account_digest(ledger.ledger_id)
    if found is not None and found.base_url != client.base_url:
        raise ConfigurationError(
            f"base_url: this batch was charged at {found.base_url}, got {client.base_url}. Use another folder, or set "
            f"DEFAPI_BASE_URL={found.base_url}"
        )
    if found is not None and found.account == account:
        return
    if found is not None and found.last_task_id is not None and not new_account:
        try:
            await client.task(found.last_task_id).query()
        except TaskNotFound as exc:
            raise ConfigurationError(
                f"api_key: belongs to another account than the one that was charged for this batch ({exc}). Set the "
                "key of that account. To go on without its unfinished tasks, pass --new-account."
            ) from None
    await ledger.set_service(client.base_url, account)


def previous_outcome(row: BatchRow, record: LedgerRow, *, retry_failed: bool) -> Outcome | None:
    """Return the outcome of an earlier run if the row needs nothing more, else None."""
    error: NanoBananaError
    if record.fingerprint != row.fingerprint:
        what = f"key {row.key!r}: was charged for another prompt or other options. Use a new key."
        return Failed(key=row.key, request=row.request, error=KeyConflict(what))
    if record.state in (RowState.UNKNOWN, RowState.SUBMITTING):
        unknown = SubmissionUnknown(record.reason or "", possible_duplicates=record.possible_duplicates)
        unknown.task_id = record.task_id
        return Unknown(key=row.key, request=row.request, error=unknown, replayed=True)
    if record.state is RowState.ABANDONED:
        error = SubmissionUnknown(f"abandoned: {record.reason}", possible_duplicates=record.possible_duplicates)
    elif record.state is RowState.FAILED and not retry_failed:
        error = _failure(record)
    else:
        return None
    return Failed(key=row.key, request=row.request, error=error, replayed=True)


def _failure(record: LedgerRow) -> NanoBananaError:
    """Return why a row has failed, as far as the ledger stores it."""
    if record.task_id is None:
        return InvalidRequest(record.reason or "the service rejected the request")
    task = Task(task_id=record.task_id, status=TaskStatus.FAILED, consumed=record.consumed, reason=record.reason)
    return no_image_error(task, record.reason_kind or ReasonKind.UNKNOWN)


def files_exist(record: LedgerRow) -> bool:
    """Return whether the files of a row still exist. Blocking."""
    return bool(record.files) and all(file.path.is_file() for file in record.files)


def task_from_row(record: LedgerRow) -> Task:
    """Return the finished task, as far as the ledger stores it."""
    return Task(task_id=record.task_id or "", status=TaskStatus.SUCCESS, consumed=record.consumed)


def to_datetime(unix_s: float | None) -> datetime | None:
    """Return a time in the ledger as datetime."""
    return None if unix_s is None else datetime.fromtimestamp(unix_s, UTC)
