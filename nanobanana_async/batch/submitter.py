"""`Submitter`: reserve, submit, settle. The ledger has each attempt before its first byte leaves."""

import logging
from types import TracebackType
from typing import Final, Self

import anyio

from nanobanana_async.batch.run_state import RunState, RunStopped
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    AuthenticationError,
    ClientClosed,
    ConfigurationError,
    InsufficientCredits,
    LedgerError,
    NanoBananaError,
    NotSent,
    RateLimited,
    SubmissionUnknown,
)
from nanobanana_async.handle import TaskHandle
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.budget import PricedAs, Reservation
from nanobanana_async.ledger.schema import BatchRow, LedgerRow
from nanobanana_async.protocols import AttemptEnd, CallbackSource, Verdict

_log: Final = logging.getLogger("nanobanana_async")


class _Deferred(Exception):
    """The service went down, or downloads fell behind, while the row waited for a slot. It is submitted later."""


class RowRecord:
    """The `SubmitRecord` of one row: ledger and money. A context manager that ends with the row."""

    def __init__(self, row: BatchRow, entry: LedgerRow, ledger: BatchLedger, run_state: RunState) -> None:
        self.row: Final = row
        self.priced_as: Final[PricedAs] = (row.request.model, row.request.image_size)
        self.is_doubted = entry.is_doubted
        self.reservation: Reservation | None = None
        """The price of the last attempt, until it is decided."""
        self.is_probe = False
        """Whether the row is the one that is submitted while the service has errors."""
        self.number = 1
        """Number of the task in this run. Above 1, it follows one that has ended (see `RegeneratePolicy`)."""
        self.last_end: AttemptEnd | None = None
        """The end of the last attempt of this run."""
        self._is_unknown = False
        """Whether an earlier attempt of this run may have been charged."""
        self._ledger = ledger
        self._run_state = run_state
        self.scope = anyio.CancelScope()
        """Encloses the submit. Shielded while an attempt lasts, because its outcome has to be recorded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reservation is not None:
            self.reservation.__exit__(kind, exc, trace)

    @property
    def is_again(self) -> bool:
        """Whether the task follows one of this run that has ended."""
        return self.number > 1

    async def reserve(self) -> None:
        """Reserve the price of the next attempt. With `is_again` it neither waits for money nor stops the run.

        Raises:
            BudgetExceeded: Another attempt could exceed the budget.
        """
        assert self.reservation is None  # noqa: S101 - released, or the row has ended
        self.reservation = await self._run_state.reserve(self.priced_as, waits_for_money=not self.is_again)

    def begin_again(self) -> None:
        """Prepare for another task, after one whose price is decided."""
        self.number, self.reservation = self.number + 1, None
        self._is_unknown = self.is_probe = self.is_doubted = False

    def reopen(self) -> None:
        """Take over the price of an attempt of an earlier run."""
        self.reservation = self._run_state.budget.reopen(self.priced_as)

    def release(self) -> None:
        """Give the price back after an attempt that was not charged, or was not made."""
        if self.reservation is not None and not self.reservation.was_sent:
            self.reservation.release()
            self.reservation = None

    async def begin_attempt(self, nonce: str | None) -> None:
        """See `SubmitRecord.begin_attempt`."""
        assert self.reservation is not None  # noqa: S101 - reserved before the submit
        if self._is_unknown:  # the row ends with this submit, whose earlier attempt may have been charged
            self._reserve_again()
        else:
            self._run_state.raise_if_stopped()
            is_blocked = self._run_state.is_probing and not self.is_probe
            if is_blocked or self._run_state.has_download_queue:
                raise _Deferred
        await self._ledger.begin_attempt(self.row.key, resubmit=self._is_unknown, is_again=self.is_again, nonce=nonce)
        self.reservation.was_sent = True
        self.scope.shield = True

    def _reserve_again(self) -> None:
        """Reserve a price for a further attempt, beside that of the one that may have been charged."""
        if self.reservation is None or self._run_state.stop_reason is not None:
            raise NotSent("not resubmitted: the run has stopped")
        if not self.reservation.was_sent:
            return  # the attempt before was not charged
        another = self._run_state.budget.try_reserve(self.priced_as)
        if another is None:
            raise NotSent("not resubmitted: another submit could exceed the budget")
        self.reservation.hold()
        self.reservation = another

    async def end_attempt(self, end: AttemptEnd) -> None:
        """See `SubmitRecord.end_attempt`."""
        self.last_end = end
        self.is_doubted = self.is_doubted or end.is_doubtful
        self._is_unknown = isinstance(end.error, SubmissionUnknown)
        try:
            await self._ledger.end_attempt(self.row.key, end, is_again=self.is_again)
        finally:
            self.scope.shield = False
        if self.reservation is not None and end.verdict in (Verdict.REJECTED, Verdict.NOT_CHARGED):
            self.reservation.was_sent = False


class Submitter:
    """Submits rows, one at a time while the service has errors."""

    def __init__(
        self, ledger: BatchLedger, client: NanoBananaClient, run_state: RunState, callback: CallbackSource | None
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._run_state = run_state
        self._callback = callback
        self._probe_lock = anyio.Lock()

    def record(self, row: BatchRow, entry: LedgerRow) -> RowRecord:
        """Return the record of *row*, to be entered for as long as the row lasts."""
        return RowRecord(row, entry, self._ledger, self._run_state)

    async def submit(self, record: RowRecord) -> TaskHandle:
        """Return the handle of the row's task once its id is durable.

        Waits while the service has errors that are not charged. Cancelling waits for the outcome of an attempt, for at
        most `Timeouts.submit_s`.

        Raises:
            SubmissionUnknown: The submit may have been charged.
            NanoBananaError: The service rejected the request, or a reference image is invalid.
            RunStopped: The run takes no more rows.
        """
        handle = None
        while handle is None:
            if not self._run_state.is_probing:
                handle = await self._submit_once(record)
                continue
            async with self._probe_lock:
                record.is_probe = self._run_state.is_probing  # still, after the wait for the lock
                if record.is_probe:
                    handle = await self._submit_once(record)
            record.is_probe = False
        return handle

    async def _submit_once(self, record: RowRecord) -> TaskHandle | None:
        """Submit once. Return None if nothing was charged and the row is to be submitted again."""
        await record.reserve()
        record.last_end = None
        try:
            with record.scope:
                handle = await self._client.submit(record.row.request, callback=self._callback, record=record)
            self._run_state.record_success()
        except _Deferred:
            return None
        except LedgerError:
            raise
        except (AuthenticationError, ConfigurationError, ClientClosed) as exc:
            self._run_state.stop(exc)
            raise RunStopped from None
        except InsufficientCredits as exc:
            await self._stop_if_empty(record, exc)
            return None
        except SubmissionUnknown as exc:
            self._run_state.record_failure(exc)
            raise
        except NanoBananaError as exc:
            is_own = record.last_end is None or record.last_end.verdict is Verdict.REJECTED
            if is_own and not isinstance(exc, NotSent | RateLimited):
                raise
            _log.info("submit failed: %s", exc)
            self._run_state.record_failure(exc)
            return None
        finally:
            record.scope = anyio.CancelScope()
            record.release()
        return handle  # pyright: ignore[reportPossiblyUnboundVariable] - nothing cancels this scope

    async def _stop_if_empty(self, record: RowRecord, exc: InsufficientCredits) -> None:
        """Stop the run if the account is empty. Words alone are not enough: they may be about a prompt."""
        price = self._run_state.budget.price(record.priced_as)
        try:
            balance = await self._client.balance()
            is_empty = exc.status == 402 or balance <= 0 if price is None else balance < price
        except NanoBananaError:
            is_empty = True  # the service has the last word
        if is_empty:
            self._run_state.stop(exc)
            raise RunStopped
        if record.last_end is not None:
            raise exc
        self._run_state.record_failure(exc)  # another row was rejected, and the client waits before the next submit
