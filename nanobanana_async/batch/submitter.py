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

_NOT_TAKEN: Final = (NotSent, RateLimited, AuthenticationError, InsufficientCredits, ConfigurationError)
"""After these, nothing was charged, and the row is not what is wrong."""


class Submitter:
    """Submits rows: each has an intent in the ledger before its first byte leaves, and its task id there after it."""

    def __init__(
        self,
        ledger: Ledger,
        client: NanoBananaClient,
        account: Budget,
        traffic: RunState,
        callback: CallbackSource | None,
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._account = account
        self._traffic = traffic
        self._callback = callback
        self._expected: dict[str, PendingCallback] = {}
        """By row key, of submits whose answer has not come."""
        self._caution = OutageBackoff()
        self.trouble: str | None = None
        """What the last submit met, while fewer are tried because of it."""
        self._alone = anyio.Lock()
        self._few = anyio.Semaphore(client.limits.submits)

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
            return await self._submit(row)
        except SubmissionUnknown:
            if (handle := await self._recovered(row)) is None:
                raise
            return handle
        finally:
            self._expected.pop(row.key, None)

    async def _submit(self, row: BatchRow) -> TaskHandle:
        handle = None
        while handle is None:
            if self._caution.is_needed:
                async with self._alone:
                    if self._caution.is_needed:  # and not only when it was this row's turn to ask
                        handle = await self._try(row)
                        continue
            handle = await self._try(row)
        return handle

    async def _try(self, row: BatchRow) -> TaskHandle | None:
        """Submit once; None when nothing was charged, and it is to be tried again."""
        try:
            async with self._few:  # the others are judged when it is nearly their turn, and not before
                await self._clearance(row.request.model)
                handle = await self._reserved(row)
        except (NotSent, RateLimited) as exc:
            self._trouble(exc)
            if getattr(exc, "possible_duplicates", 0):
                raise
            return None
        except (SubmissionUnknown, ServiceUnavailable) as exc:
            self._trouble(exc)
            raise
        except (AuthenticationError, InsufficientCredits, ConfigurationError) as exc:
            self._traffic.stop(exc)
            raise RunStopped from None
        self._caution.worked()
        self.trouble = None
        return handle

    def _trouble(self, exc: NanoBananaError) -> None:
        now_s = anyio.current_time()
        self._caution.failed(now_s)
        _log.info("a submit met trouble: %s", exc)
        self.trouble = str(exc) if self._caution.is_needed else None
        if self._caution.is_hopeless(now_s, was_busy=isinstance(exc, RateLimited)):
            self._traffic.stop(exc)

    async def _clearance(self, model: str) -> None:
        """Wait until one more submit is in order: no trouble, no paid pictures that queue, and money for it."""
        with anyio.move_on_after(self._caution.pause_s()):
            while True:
                await self._traffic.changed()
        while True:
            self._traffic.check()
            affordable = self._account.allows(model)
            if affordable and self._traffic.saving <= self._client.limits.downloads:
                self._account.begin(model)  # here, for the next to ask must be told of this one
                self._traffic.pending += 1
                return
            if not affordable and not self._traffic.pending:
                self._traffic.stop(BudgetExceeded(self._poverty(model)))
            await self._traffic.changed()

    def _poverty(self, model: str) -> str:
        funds, price = self._account.funds(), self._account.price(model)
        next_one = "nobody knows what a picture costs" if price is None else f"one more may cost {price.normalize():f}"
        reserved = f", {funds.reserved.normalize():f} may be charged for what is unknown" if funds.reserved else ""
        return (
            f"the budget does not allow another submit: {funds.spent.normalize():f} credits are spent{reserved}, "
            f"and {next_one}"
        )

    async def _reserved(self, row: BatchRow) -> TaskHandle:
        """Submit what `_clearance` has counted in; on return it still counts."""
        try:
            return await self._post(row)
        except BaseException:
            self._traffic.pending -= 1
            self._traffic.change()
            raise

    async def _post(self, row: BatchRow) -> TaskHandle:
        """Submit, by the book."""
        model, sends = row.request.model, 0
        expected = None if self._callback is None else self._callback.expect()
        nonce = None if expected is None else expected.nonce
        if expected is not None:
            self._expected[row.key] = expected

        async def intend() -> None:
            nonlocal sends
            self._traffic.check()
            if sends and not self._account.allows(model):
                raise BudgetExceeded(f"it was not tried again: {self._poverty(model)}")
            await self._ledger.intend(row.key, again=sends > 0, nonce=nonce)
            if sends:
                self._account.begin(model)  # the time before may be charged, too
            sends += 1
            scope.shield = True  # from here on it may be paid: its end must be written down, whoever cancels

        with anyio.CancelScope() as scope:
            try:
                handle = await self._client.submit(row.request, callback=expected, before_send=intend)
            except (NanoBananaError, RunStopped) as exc:
                if sends:
                    await self._close_books(row, exc, sends)
                raise
            finally:
                if not sends:
                    self._account.end(model, None)
            await self._keep_id(row, handle)
        return handle

    async def _recovered(self, row: BatchRow) -> TaskHandle | None:
        """Return the task that a callback tells, after an answer was lost. Cancelling leaves the row unknown."""
        expected = self._expected.get(row.key)
        found = None if expected is None else await self._client.recovered(expected)
        if expected is None or found is None:
            return None
        await self._ledger.recognise(expected.nonce, found.task_id)
        self._traffic.tasks[row.key] = found.task_id
        self._traffic.pending += 1
        return found

    async def _close_books(self, row: BatchRow, exc: Exception, sends: int) -> None:
        if isinstance(exc, SubmissionUnknown):
            await self._ledger.move(row.key, RowState.UNKNOWN, reason=str(exc))
            return
        # After a re-send, a try before it may be charged: that is for its owner to decide about.
        state = RowState.REFUSED if isinstance(exc, _NOT_TAKEN) and sends == 1 else RowState.FAILED
        await self._ledger.move(row.key, state, reason=str(exc), ended_at=time.time())
        self._account.end(row.request.model, None)

    async def _keep_id(self, row: BatchRow, handle: TaskHandle) -> None:
        self._traffic.tasks[row.key] = handle.task_id
        try:
            await self._ledger.move(row.key, RowState.SUBMITTED, task_id=handle.task_id, submitted_at=time.time())
        except LedgerError as exc:
            _log.error("task %s of row %s is paid, and not in the ledger: %s", handle.task_id, row.key, exc)
            raise
