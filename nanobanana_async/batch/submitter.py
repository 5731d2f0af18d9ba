"""`Submitter`: submit rows with a durable record of each attempt."""

import logging
import time
from typing import Final

import anyio

from nanobanana_async._text import format_credits
from nanobanana_async.batch.outage import OutageBackoff
from nanobanana_async.batch.run_state import RunState, RunStopped
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    AuthenticationError,
    BudgetExceeded,
    ConfigurationError,
    InsufficientCredits,
    LedgerError,
    NanoBananaError,
    NotSent,
    RateLimited,
    ServiceUnavailable,
    SubmissionUnknown,
)
from nanobanana_async.handle import TaskHandle
from nanobanana_async.ledger.budget import Budget
from nanobanana_async.ledger.schema import BatchRow, RowState
from nanobanana_async.ledger.sqlite import Ledger
from nanobanana_async.protocols import CallbackSource, PendingCallback

_log: Final = logging.getLogger("nanobanana_async")

_NOT_CHARGED: Final = (NotSent, RateLimited, AuthenticationError, InsufficientCredits, ConfigurationError)
"""Errors after which nothing was charged and the row itself is valid."""


class Submitter:
    """Submits rows. The ledger has each attempt before its first byte is sent, and its task id right after it."""

    def __init__(
        self,
        ledger: Ledger,
        client: NanoBananaClient,
        budget: Budget,
        run_state: RunState,
        callback: CallbackSource | None,
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._budget = budget
        self._run_state = run_state
        self._callback = callback
        self._pending_callbacks: dict[str, PendingCallback] = {}
        """Pending callbacks by row key, of submits without a response."""
        self._outage = OutageBackoff()
        self.last_error: str | None = None
        """Error of the last submit, while the run backs off."""
        self._probe_lock = anyio.Lock()
        self._reserve_slots = anyio.Semaphore(client.limits.max_submits)

    async def submit(self, row: BatchRow) -> TaskHandle:
        """Return the handle of the row's task once its id is durable.

        Waits while the service has errors that are not charged. Can be cancelled until the attempt is recorded. After
        that it runs until the outcome is recorded, for at most `Timeouts.submit_s`.

        Raises:
            SubmissionUnknown: The submit may have been charged.
            NanoBananaError: The service rejected the request, or a reference image is invalid.
            RunStopped: The run takes no more rows.
        """
        try:
            return await self._submit_until_sent(row)
        except SubmissionUnknown:
            if (handle := await self._recover(row)) is None:
                raise
            return handle
        finally:
            self._pending_callbacks.pop(row.key, None)

    async def _submit_until_sent(self, row: BatchRow) -> TaskHandle:
        handle = None
        while handle is None:
            if self._outage.is_probing:
                async with self._probe_lock:
                    if self._outage.is_probing:  # still probing after the wait for the lock
                        handle = await self._submit_once(row)
                        continue
            handle = await self._submit_once(row)
        return handle

    async def _submit_once(self, row: BatchRow) -> TaskHandle | None:
        """Submit once. Return None if nothing was charged and the row is to be submitted again."""
        try:
            async with self._reserve_slots:  # the budget is checked shortly before the submit, not earlier
                await self._reserve(row.request.model)
                handle = await self._submit_reserved(row)
        except (NotSent, RateLimited) as exc:
            self._record_failure(exc)
            if getattr(exc, "possible_duplicates", 0):
                raise
            return None
        except (SubmissionUnknown, ServiceUnavailable) as exc:
            self._record_failure(exc)
            raise
        except (AuthenticationError, InsufficientCredits, ConfigurationError) as exc:
            self._run_state.stop(exc)
            raise RunStopped from None
        self._outage.record_success()
        self.last_error = None
        return handle

    def _record_failure(self, exc: NanoBananaError) -> None:
        now_s = anyio.current_time()
        self._outage.record_failure(now_s)
        _log.info("submit failed: %s", exc)
        self.last_error = str(exc) if self._outage.is_probing else None
        if self._outage.should_give_up(now_s, rate_limited=isinstance(exc, RateLimited)):
            self._run_state.stop(exc)

    async def _reserve(self, model: str) -> None:
        """Wait until one more submit is allowed by outage, downloads and budget, and reserve it."""
        with anyio.move_on_after(self._outage.backoff_s()):
            while True:
                await self._run_state.wait_change()
        while True:
            self._run_state.raise_if_stopped()
            affordable = self._budget.can_reserve(model)
            if affordable and self._run_state.saving <= self._client.limits.max_downloads:
                self._budget.reserve(model)  # before the next caller checks the budget
                self._run_state.pending += 1
                return
            if not affordable and not self._run_state.pending:
                self._run_state.stop(BudgetExceeded(self._budget_message(model)))
            await self._run_state.wait_change()

    def _budget_message(self, model: str) -> str:
        status, price = self._budget.status(), self._budget.max_price(model)
        next_one = "the price is not yet known" if price is None else f"one more may cost {format_credits(price)}"
        reserved = f", {format_credits(status.reserved)} reserved" if status.reserved else ""
        return (
            f"budget: another submit could exceed it: {format_credits(status.spent)} credits spent{reserved}, "
            f"and {next_one}"
        )

    async def _submit_reserved(self, row: BatchRow) -> TaskHandle:
        """Submit a row that `_reserve` has reserved. The reservation remains on return."""
        try:
            return await self._submit_recorded(row)
        except BaseException:
            self._run_state.pending -= 1
            self._run_state.notify_all()
            raise

    async def _submit_recorded(self, row: BatchRow) -> TaskHandle:
        """Submit, with a durable record of the attempt and its outcome."""
        model, submit_count = row.request.model, 0
        pending_callback = None if self._callback is None else self._callback.register()
        nonce = None if pending_callback is None else pending_callback.nonce
        if pending_callback is not None:
            self._pending_callbacks[row.key] = pending_callback

        async def begin_attempt() -> None:
            nonlocal submit_count
            self._run_state.raise_if_stopped()
            if submit_count and not self._budget.can_reserve(model):
                raise BudgetExceeded(f"not resubmitted: {self._budget_message(model)}")
            await self._ledger.begin_attempt(row.key, resubmit=submit_count > 0, nonce=nonce)
            if submit_count:
                self._budget.reserve(model)  # the earlier submit may also have been charged
            submit_count += 1
            # From here on the submit may be charged, so its outcome is recorded even if the caller is cancelled.
            scope.shield = True

        with anyio.CancelScope() as scope:
            try:
                handle = await self._client.submit(row.request, callback=pending_callback, before_send=begin_attempt)
            except (NanoBananaError, RunStopped) as exc:
                if submit_count:
                    await self._close_books(row, exc, submit_count)
                raise
            finally:
                if not submit_count:
                    self._budget.settle(model, None)
            await self._record_task_id(row, handle)
        return handle  # pyright: ignore[reportPossiblyUnboundVariable] - nothing cancels this scope

    async def _recover(self, row: BatchRow) -> TaskHandle | None:
        """Wait for the callback of a submit whose response was lost. Cancelling leaves the row unknown."""
        pending_callback = self._pending_callbacks.get(row.key)
        found = None if pending_callback is None else await self._client.recover(pending_callback)
        if pending_callback is None or found is None:
            return None
        await self._ledger.bind_by_nonce(pending_callback.nonce, found.task_id)
        self._run_state.task_ids[row.key] = found.task_id
        self._run_state.pending += 1
        return found

    async def _close_books(self, row: BatchRow, exc: Exception, submit_count: int) -> None:
        if isinstance(exc, SubmissionUnknown):
            await self._ledger.transition(row.key, RowState.UNKNOWN, reason=str(exc))
            return
        # After a resubmit, an earlier submit may have been charged: the user has to decide.
        state = RowState.REJECTED if isinstance(exc, _NOT_CHARGED) and submit_count == 1 else RowState.FAILED
        await self._ledger.transition(row.key, state, reason=str(exc), ended_at=time.time())
        self._budget.settle(row.request.model, None)

    async def _record_task_id(self, row: BatchRow, handle: TaskHandle) -> None:
        self._run_state.task_ids[row.key] = handle.task_id
        try:
            await self._ledger.transition(row.key, RowState.SUBMITTED, task_id=handle.task_id, submitted_at=time.time())
        except LedgerError as exc:
            _log.error("task %s of row %s is charged and not in the ledger: %s", handle.task_id, row.key, exc)
            raise
