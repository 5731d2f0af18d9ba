"""`Submitter`: the step that costs money, by the book, and only when it is in order."""

import logging
import time
from typing import Final

import anyio

from nanobanana_async.batch.outage import OutageBackoff
from nanobanana_async.batch.rows import BatchRow
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
from nanobanana_async.ledger.schema import RowState
from nanobanana_async.ledger.sqlite import Ledger
from nanobanana_async.models import CallbackSource, PendingCallback

_log: Final = logging.getLogger("nanobanana_async")

_NOT_CHARGED: Final = (NotSent, RateLimited, AuthenticationError, InsufficientCredits, ConfigurationError)
"""After these, nothing was charged, and the row is not what is wrong."""


class Submitter:
    """Submits rows: each has an intent in the ledger before its first byte leaves, and its task id there after it."""

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
        """By row key, of submits whose answer has not come."""
        self._outage = OutageBackoff()
        self.last_error: str | None = None
        """What the last submit met, while fewer are tried because of it."""
        self._probe_lock = anyio.Lock()
        self._reserve_slots = anyio.Semaphore(client.limits.max_submits)

    async def submit(self, row: BatchRow) -> TaskHandle:
        """Return the handle of the row's task, once its id is durable.

        While the service is in trouble that charges nothing, waits. Cancelling is heeded up to the intent; from there
        on the row has to come to a durable state, within `Timeouts.submit_s`.

        Raises:
            SubmissionUnknown: It may be paid.
            NanoBananaError: The service, or a reference image, is against it.
            RunStopped: The run takes nothing more on.
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
                    if self._outage.is_probing:  # and not only when it was this row's turn to ask
                        handle = await self._submit_once(row)
                        continue
            handle = await self._submit_once(row)
        return handle

    async def _submit_once(self, row: BatchRow) -> TaskHandle | None:
        """Submit once; None when nothing was charged, and it is to be tried again."""
        try:
            async with self._reserve_slots:  # the others are judged when it is nearly their turn, and not before
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
        _log.info("a submit met trouble: %s", exc)
        self.last_error = str(exc) if self._outage.is_probing else None
        if self._outage.should_give_up(now_s, rate_limited=isinstance(exc, RateLimited)):
            self._run_state.stop(exc)

    async def _reserve(self, model: str) -> None:
        """Wait until one more submit is in order: no trouble, no paid pictures that queue, and money for it."""
        with anyio.move_on_after(self._outage.backoff_s()):
            while True:
                await self._run_state.wait_change()
        while True:
            self._run_state.raise_if_stopped()
            affordable = self._budget.can_reserve(model)
            if affordable and self._run_state.saving <= self._client.limits.max_downloads:
                self._budget.reserve(model)  # here, for the next to ask must be told of this one
                self._run_state.pending += 1
                return
            if not affordable and not self._run_state.pending:
                self._run_state.stop(BudgetExceeded(self._budget_message(model)))
            await self._run_state.wait_change()

    def _budget_message(self, model: str) -> str:
        funds, price = self._budget.status(), self._budget.max_price(model)
        next_one = "nobody knows what a picture costs" if price is None else f"one more may cost {price.normalize():f}"
        reserved = f", {funds.reserved.normalize():f} may be charged for what is unknown" if funds.reserved else ""
        return (
            f"the budget does not allow another submit: {funds.spent.normalize():f} credits are spent{reserved}, "
            f"and {next_one}"
        )

    async def _submit_reserved(self, row: BatchRow) -> TaskHandle:
        """Submit what `_clearance` has counted in; on return it still counts."""
        try:
            return await self._submit_recorded(row)
        except BaseException:
            self._run_state.pending -= 1
            self._run_state.notify_all()
            raise

    async def _submit_recorded(self, row: BatchRow) -> TaskHandle:
        """Submit, by the book."""
        model, submit_count = row.request.model, 0
        pending_callback = None if self._callback is None else self._callback.register()
        nonce = None if pending_callback is None else pending_callback.nonce
        if pending_callback is not None:
            self._pending_callbacks[row.key] = pending_callback

        async def intend() -> None:
            nonlocal submit_count
            self._run_state.raise_if_stopped()
            if submit_count and not self._budget.can_reserve(model):
                raise BudgetExceeded(f"it was not tried again: {self._budget_message(model)}")
            await self._ledger.begin_attempt(row.key, resubmit=submit_count > 0, nonce=nonce)
            if submit_count:
                self._budget.reserve(model)  # the time before may be charged, too
            submit_count += 1
            scope.shield = True  # from here on it may be paid: its end must be written down, whoever cancels

        with anyio.CancelScope() as scope:
            try:
                handle = await self._client.submit(row.request, callback=pending_callback, before_send=intend)
            except (NanoBananaError, RunStopped) as exc:
                if submit_count:
                    await self._close_books(row, exc, submit_count)
                raise
            finally:
                if not submit_count:
                    self._budget.settle(model, None)
            await self._record_task_id(row, handle)
        return handle

    async def _recover(self, row: BatchRow) -> TaskHandle | None:
        """Return the task that a callback tells, after an answer was lost. Cancelling leaves the row unknown."""
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
        # After a re-send, a try before it may be charged: that is for its owner to decide about.
        state = RowState.REJECTED if isinstance(exc, _NOT_CHARGED) and submit_count == 1 else RowState.FAILED
        await self._ledger.transition(row.key, state, reason=str(exc), ended_at=time.time())
        self._budget.settle(row.request.model, None)

    async def _record_task_id(self, row: BatchRow, handle: TaskHandle) -> None:
        self._run_state.task_ids[row.key] = handle.task_id
        try:
            await self._ledger.transition(row.key, RowState.SUBMITTED, task_id=handle.task_id, submitted_at=time.time())
        except LedgerError as exc:
            _log.error("task %s of row %s is paid, and not in the ledger: %s", handle.task_id, row.key, exc)
            raise
