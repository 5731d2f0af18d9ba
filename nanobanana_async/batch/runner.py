"""`Batch`: rows -> ledger -> client -> files. An interrupted batch can be resumed."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable
from decimal import Decimal
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.map_unordered import map_unordered
from nanobanana_async.batch import report
from nanobanana_async.batch.preview import BatchPreview
from nanobanana_async.batch.resume import check_service
from nanobanana_async.batch.row_file import RowFile
from nanobanana_async.batch.row_runner import RowRunner
from nanobanana_async.batch.rows import Rows, with_keys
from nanobanana_async.batch.run_state import BatchProgress, RunState
from nanobanana_async.batch.submitter import Submitter
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    ClientClosed,
    ConfigurationError,
    KeyConflict,
    LedgerError,
    TaskTimeout,
)
from nanobanana_async.images.files import FileImageStore, remove_partial_files
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.ledger.sqlite import GROUP_COMMIT_S
from nanobanana_async.models import GenerationRequest
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown
from nanobanana_async.protocols import CallbackSource, ImageStore
from nanobanana_async.recovery import CallbackRecovery

_UPSERT_CHUNK: Final = 100
_log: Final = logging.getLogger("nanobanana_async")
_REPORT_INTERVAL_S: Final = 60.0
"""Interval at which the gallery, the manifest and the results are rewritten."""
_REPORT_PAUSE_FACTOR: Final = 20
"""Least pause between two reports, in multiples of the time that one takes: 100,000 rows take seconds."""


class Batch:
    """A folder of images with its ledger. Create it with `Batch.open`.

    A later run over the same rows resumes: it downloads charged images, leaves unknown rows alone, and submits the
    rest. The folder contains no API key.
    """

    def __init__(
        self,
        ledger: BatchLedger,
        client: NanoBananaClient,
        run_state: RunState,
        image_store: ImageStore,
        callback: CallbackSource | None,
    ) -> None:
        self.folder: Final = ledger.folder
        self._ledger = ledger
        self._client = client
        self._run_state = run_state
        self._background = BackgroundTaskGroup()
        submitter = Submitter(ledger, client, run_state, callback)
        self._row_runner = RowRunner(client, ledger, run_state, submitter, image_store)
        self._outcome_counts: Counter[type[Outcome] | str] = Counter()
        self._callback = callback
        self._recovery = CallbackRecovery(self._background, lambda task_id: client.task(task_id).query())
        if callback is not None:
            callback.unmatched_hooks.append(self._on_unmatched_callback)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(  # noqa: PLR0913 - public: one parameter per decision of the user
        cls,
        folder: str | os.PathLike[str],
        client: NanoBananaClient,
        *,
        budget: Decimal | None = None,
        max_price: Decimal | None = None,
        image_store: ImageStore | None = None,
        callback: CallbackSource | None = None,
        ledger_folder: str | os.PathLike[str] | None = None,
        group_commit_s: float = GROUP_COMMIT_S,
        new_account: bool = False,
    ) -> AsyncGenerator["Batch"]:
        """Open the batch in *folder*, which is created if missing. Leaving the block closes it (see `aclose`).

        Args:
            folder: Folder of images and ledger. One process at a time may use it.
            client: The client that submits and waits. It is not closed.
            budget: Credits that all runs together may spend. A submit that could exceed it is not sent. Submits in
                flight, and those that may have been charged, count at the largest price seen for their model and image
                size. While that price is not known, one submit at a time is sent.
            max_price: Upper bound of a price that was not seen yet, for a budget where prices cannot be learned one at
                a time.
            image_store: Stores the images; None writes them to *folder*.
            callback: A `CallbackReceiver`, as for `client.submit`. A callback also resolves an unknown row, in any run.
            ledger_folder: Folder of the ledger; None means where it was before, at first *folder*. For a *folder* on a
                file system without locks.
            group_commit_s: How long a ledger write waits for others to share its fsync, 0 to 1 second. A row has four
                writes. A row whose writes were waiting when the process was killed may become unknown.
            new_account: Whether the key may belong to another account than in earlier runs. Charged tasks of the other
                account are not found, and become unknown.

        Raises:
            LedgerError: Another process holds the folder (`exc.pid`), or its ledger cannot be used.
            ConfigurationError: The ledger is about another service or account, or an amount is not positive.
        """
        _check_credits("budget", budget)
        _check_credits("max_price", max_price)
        home = None if ledger_folder is None else Path(ledger_folder)
        ledger = await BatchLedger.open(Path(folder), ledger_folder=home, group_commit_s=group_commit_s)
        try:
            await check_service(ledger, client, new_account=new_account)
            await anyio.to_thread.run_sync(remove_partial_files, ledger.folder)
            run_state = RunState(budget, max_price, client.limits.max_downloads)
            run_state.budget.add_attempts(await ledger.attempt_costs())
            store = image_store or FileImageStore(ledger.folder, replace=False)
            batch = cls(ledger, client, run_state, store, callback)
        except BaseException:
            await ledger.aclose()
            raise
        try:
            await batch._background.ensure_started()
            batch._background.start_soon(batch._report_periodically)
            yield batch
        finally:
            await batch.aclose()

    async def run(
        self, rows: Rows, *, max_in_flight: int = 200, retry_failed: bool = False, timeout_s: float | None = None
    ) -> AsyncGenerator[Outcome]:
        """Run all *rows* and yield one outcome each, in completion order. A failed row does not stop the run.

        Outcomes of earlier runs are yielded again, marked `replayed`, because the program may have ended before it used
        them. Charged rows of earlier runs that are not among *rows* and not saved come last.

        Args:
            rows: `BatchRow`s (from `read_rows`), requests or prompts. Taken when a slot is free.
            max_in_flight: Rows running, or finished and not yet consumed. A slow consumer slows the submits.
            retry_failed: Whether to submit failed rows again; each may be charged again.
            timeout_s: Seconds to wait for each image; None uses `Timeouts.task_s`. A row that is not final by then is
                `Failed` with `TaskTimeout`, and the next run continues to wait.

        Raises, after the last outcome, what prevents more submits:
            AuthenticationError, InsufficientCredits: The service rejected the key, or the account is empty.
            BudgetExceeded: Another image could exceed the budget.
            LedgerError: The ledger could not be written.
            ImageError: An image could not be written to the disk, or no image was downloaded for an hour, or ever.
            NotSent, RateLimited, ServiceUnavailable, SubmissionUnknown: No submit has worked for an hour, or ever.
        """
        await self._background.ensure_started()

        async def work(entered: tuple[BatchRow, LedgerRow | None]) -> Outcome | None:
            row, record = entered
            outcome: Outcome | None
            if record is None:
                error = KeyConflict(f"row {row.key}: another row has this key")
                return Failed(key=row.key, request=row.request, line=row.line, error=error)
            outcome = await self._row_runner.run(row, record, retry_failed=retry_failed, timeout_s=timeout_s)
            if outcome is not None:
                outcome = attrs.evolve(outcome, line=row.line)
                is_running = isinstance(outcome, Failed) and isinstance(outcome.error, TaskTimeout)
                self._outcome_counts["running" if is_running else type(outcome)] += 1
                self._outcome_counts["replayed"] += outcome.replayed
            return outcome

        outcomes: AsyncGenerator[Outcome] = map_unordered(
            self._background,
            self._registered_rows(rows),
            work,
            max_in_flight=max_in_flight,
            on_unconsumed=_ignore_unconsumed,
        )
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome
        if self._run_state.stop_reason is not None:
            raise self._run_state.stop_reason

    async def preview(self, rows: RowFile) -> BatchPreview:
        """Return what `run` would do with *rows*, compared with what earlier runs have charged. Sends nothing."""
        return BatchPreview.of(len(rows), await self._ledger.count_states(rows))

    def progress(self) -> BatchProgress:
        """Return a snapshot of the run. No I/O."""
        ended = self._outcome_counts
        return BatchProgress(
            succeeded=ended[Succeeded],
            failed=ended[Failed],
            unknown=ended[Unknown],
            running=ended["running"],
            replayed=ended["replayed"],
            in_flight=self._run_state.in_flight,
            is_learning_price=self._run_state.is_learning_price,
            budget=self._run_state.budget.status(),
            last_error=self._run_state.last_error,
        )

    async def aclose(self) -> None:
        """Close the batch: take no more rows, let submits in flight finish within `Timeouts.submit_s`, stop waiting.

        The next run downloads what is charged and not saved. The gallery and the manifest are written. Call it from any
        task. A second call has no effect.
        """
        timeouts = self._client.timeouts
        self._run_state.stop(ClientClosed("batch: was closed"))
        with anyio.move_on_after(timeouts.submit_s + timeouts.close_s, shield=True):
            try:
                await self._background.aclose(drain_s=0)
                await self._report()
            finally:
                if self._callback is not None and self._on_unmatched_callback in self._callback.unmatched_hooks:
                    self._callback.unmatched_hooks.remove(self._on_unmatched_callback)
                await self._ledger.aclose()

    async def _report(self) -> None:
        """Write the report in threads, from small pages of the ledger, whose writes do not wait for it."""
        try:
            columns, delimiter = await self._ledger.columns(), await self._ledger.delimiter()
            writer = await anyio.to_thread.run_sync(report.ReportWriter, self.folder, columns, delimiter)
            with contextlib.ExitStack() as stack:
                stack.push(writer)
                async with contextlib.aclosing(self._ledger.pages()) as pages:
                    async for page in pages:
                        await anyio.to_thread.run_sync(writer.add, page)
                await anyio.to_thread.run_sync(stack.pop_all().close)
        except LedgerError:
            return
        except OSError as exc:  # not an error of the ledger, from which the report can be written again
            _log.warning("the gallery, the manifest or the results cannot be written: %s", exc)
        except Exception:  # noqa: BLE001 - a report is no reason to end a run of charged images
            _log.exception("the gallery, the manifest or the results cannot be written")

    async def _report_periodically(self) -> None:
        took_s = 0.0
        while True:
            await anyio.sleep(max(_REPORT_INTERVAL_S, took_s * _REPORT_PAUSE_FACTOR))
            began_s = anyio.current_time()
            await self._report()
            took_s = anyio.current_time() - began_s

    # --- unknown rows -----------------------------------------------------------------------------------------------

    async def unknown_rows(self) -> list[LedgerRow]:
        """Return the rows that may have been charged without a confirmation."""
        return await self._ledger.list_rows(RowState.UNKNOWN)

    async def resubmit(self, key: str) -> None:
        """Let the next run submit the unknown row *key* again. It may be charged twice."""
        await self._ledger.resolve(key, RowState.REQUEUED)

    async def abandon(self, key: str) -> None:
        """Give up the unknown row *key*. It counts as failed and is never submitted again."""
        await self._ledger.resolve(key, RowState.ABANDONED)

    async def bind(self, key: str, task_id: str) -> None:
        """Record the task id of the unknown row *key*, known from a log, a callback or the service's support.

        Raises:
            TaskNotFound: The service does not know the task.
            LedgerError: The row is not unknown, or another row has that task.
        """
        await self._ledger.bind(key, (await self._client.task(task_id).query()).task_id)

    async def _on_unmatched_callback(self, nonce: str, task_id: str) -> None:
        """Handle a callback that names a task whose submit is not known to have it."""
        if await self._ledger.is_unresolved(nonce):
            await self._recovery.recover(nonce, task_id, self._ledger.bind_by_nonce)

    # --- all rows ---------------------------------------------------------------------------------------------------

    async def _registered_rows(self, rows: Rows) -> AsyncGenerator[tuple[BatchRow, LedgerRow | None]]:
        """Insert rows into the ledger, many per transaction, until the run stops. None marks a repeated key."""
        most = 1 if isinstance(rows, AsyncIterable) else _UPSERT_CHUNK  # the next one may arrive much later
        listing = await self._ledger.begin_listing()
        if isinstance(rows, RowFile) and rows.delimiter is not None:
            await self._ledger.set_delimiter(rows.delimiter)
        waiting: list[BatchRow] = []
        error: Exception | None = None
        async with contextlib.aclosing(with_keys(rows)) as all_rows:
            async for row in all_rows:
                if isinstance(row, Exception):
                    error = row
                else:
                    waiting.append(row)
                if error is not None or len(waiting) >= most:
                    for pair in await self._register(waiting, listing):
                        yield pair
                if self._run_state.stop_reason is not None:
                    return
        for pair in await self._register(waiting, listing):
            yield pair
        if error is not None:
            raise error
        for record in await self._ledger.unlisted_rows(listing):
            yield _row_from_ledger(record), record

    async def _register(self, waiting: list[BatchRow], listing: int) -> list[tuple[BatchRow, LedgerRow | None]]:
        entered = list(zip(waiting, await self._ledger.upsert_rows(waiting, listing=listing), strict=True))
        waiting.clear()
        return entered


def _check_credits(name: str, amount: object) -> None:
    if amount is not None and not (isinstance(amount, Decimal) and amount.is_finite() and amount > 0):
        raise ConfigurationError(f"{name}: expected a Decimal of more than 0 credits, got {amount!r:.80}")


def _row_from_ledger(record: LedgerRow) -> BatchRow:
    request = GenerationRequest(record.prompt, model=record.model, image_size=record.image_size)
    return BatchRow(key=record.key, request=request, fingerprint=record.fingerprint, line=record.line)


def _ignore_unconsumed(_: Outcome) -> None:
    """Do nothing about an outcome that was not consumed: the next run yields it again."""
