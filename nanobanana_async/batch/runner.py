"""`Batch`: rows -> ledger -> client -> files. An interrupted batch can be resumed."""

import contextlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.map_unordered import map_unordered
from nanobanana_async.batch import report
from nanobanana_async.batch.resume import files_exist, previous_outcome, task_from_row, to_datetime
from nanobanana_async.batch.rows import Rows, with_keys
from nanobanana_async.batch.run_state import BatchProgress, RunState, RunStopped
from nanobanana_async.batch.submitter import Submitter
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    AuthenticationError,
    ConfigurationError,
    ImageError,
    LedgerError,
    NanoBananaError,
    SubmissionUnknown,
    TaskNotFound,
)
from nanobanana_async.handle import TaskHandle, no_image_error
from nanobanana_async.images.files import FileImageStore, remove_partial_files
from nanobanana_async.ledger.budget import Budget
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.ledger.sqlite import GROUP_COMMIT_S, Ledger
from nanobanana_async.models import GenerationRequest, SavedImage, Task
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown, outcome_from_error
from nanobanana_async.protocols import CallbackSource, ImageStore

_UPSERT_CHUNK: Final = 100
_log: Final = logging.getLogger("nanobanana_async")
_CONFIRM_INTERVAL_S: Final = 10.0
"""Minimum time between two queries that callbacks about one unknown row trigger."""
_REPORT_INTERVAL_S: Final = 60.0
"""Interval at which the gallery and the manifest are rewritten."""


class Batch:
    """A folder of images with its ledger. Create it with `Batch.open`.

    A later run over the same rows resumes: it downloads charged images, leaves unknown rows alone, and submits the
    rest. The folder contains no API key.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: NanoBananaClient,
        budget: Budget,
        image_store: ImageStore | None,
        callback: CallbackSource | None,
    ) -> None:
        self.folder: Final = ledger.folder
        self._ledger = ledger
        self._client = client
        self._budget = budget
        self._image_store: ImageStore = image_store or FileImageStore(ledger.folder)
        self._background = BackgroundTaskGroup()
        self._run_state = RunState()
        self._submitter = Submitter(ledger, client, budget, self._run_state, callback)
        self._outcome_counts: Counter[type[Outcome] | str] = Counter()
        self._last_confirm_s: dict[str, float] = {}
        self._seen_keys: set[str] = set()
        """Keys seen in this run. Charged rows of earlier runs without one are completed at its end."""
        self._callback = callback
        if callback is not None:
            callback.unmatched_hooks.append(self._on_unmatched_callback)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        folder: str | os.PathLike[str],
        client: NanoBananaClient,
        *,
        budget: Decimal | None = None,
        image_store: ImageStore | None = None,
        callback: CallbackSource | None = None,
        group_commit_s: float = GROUP_COMMIT_S,
    ) -> AsyncGenerator["Batch"]:
        """Open the batch in *folder*, which is created if missing. Leaving the block closes it (see `aclose`).

        Args:
            folder: Folder of images and ledger. One process at a time may use it.
            client: The client that submits and waits. It is not closed.
            budget: Credits that all runs together may spend. A submit that could exceed it is not sent. Submits in
                flight count at the largest price seen for their model.
            image_store: Stores the images; None writes them to *folder*.
            callback: A `CallbackReceiver`, as for `client.submit`. A callback also resolves an unknown row, in any run.
            group_commit_s: How long a ledger write waits for others to share its fsync, 0 to 1 second. A row has four
                writes. A row whose writes were waiting when the process was killed may become unknown.

        Raises:
            LedgerError: Another process holds the folder (`exc.pid`), or its ledger cannot be used.
        """
        ledger = await Ledger.open(Path(folder), group_commit_s=group_commit_s)
        try:
            await anyio.to_thread.run_sync(remove_partial_files, ledger.folder)
            batch = cls(
                ledger, client, Budget.from_attempts(await ledger.attempt_costs(), budget), image_store, callback
            )
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
            ImageError: An image could not be written to the disk.
            NotSent, RateLimited, ServiceUnavailable, SubmissionUnknown: No submit has worked for an hour, or ever.
        """
        await self._background.ensure_started()

        async def work(entered: tuple[BatchRow, LedgerRow | None]) -> Outcome | None:
            row, record = entered
            if record is None:
                error = ConfigurationError(f"row {row.key}: another row has this key")
                return Failed(key=row.key, request=row.request, error=error)
            outcome = await self._run_row(row, record, retry_failed=retry_failed, timeout_s=timeout_s)
            if outcome is not None:
                self._outcome_counts[type(outcome)] += 1
                self._outcome_counts["replayed"] += outcome.replayed
            return outcome

        self._seen_keys.clear()
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

    @property
    def in_flight(self) -> Mapping[str, str]:
        """Task ids by key of rows that are charged and not saved. After a `LedgerError` it is their last record."""
        return self._run_state.task_ids

    def progress(self) -> BatchProgress:
        """Return a snapshot of the run. No I/O."""
        ended = self._outcome_counts
        return BatchProgress(
            succeeded=ended[Succeeded],
            failed=ended[Failed],
            unknown=ended[Unknown],
            replayed=ended["replayed"],
            in_flight=len(self._run_state.task_ids),
            budget=self._budget.status(),
            last_error=self._submitter.last_error,
        )

    async def aclose(self) -> None:
        """Close the batch: take no more rows, let submits in flight finish within `Timeouts.submit_s`, stop waiting.

        The next run downloads what is charged and not saved. The gallery and the manifest are written. Call it from any
        task. A second call has no effect.
        """
        timeouts = self._client.timeouts
        self._run_state.stop(ConfigurationError("batch: was closed"))
        with anyio.move_on_after(timeouts.submit_s + timeouts.close_s, shield=True):
            try:
                await self._background.aclose(drain_s=0)
                await self._report()
            finally:
                if self._callback is not None and self._on_unmatched_callback in self._callback.unmatched_hooks:
                    self._callback.unmatched_hooks.remove(self._on_unmatched_callback)
                await self._ledger.aclose()

    async def _report(self) -> None:
        def write(records: Iterator[LedgerRow]) -> OSError | None:
            try:
                report.write(self.folder, records)
            except OSError as exc:  # not an error of the ledger, from which the report can be written again
                return exc
            return None

        with contextlib.suppress(LedgerError):
            if (failed := await self._ledger.query_rows(write)) is not None:
                _log.warning("%s cannot be written: %s", report.GALLERY_NAME, failed)

    async def _report_periodically(self) -> None:
        while True:
            await anyio.sleep(_REPORT_INTERVAL_S)
            await self._report()

    # --- unknown rows -----------------------------------------------------------------------------------------------

    async def unknown_rows(self) -> list[LedgerRow]:
        """Return the rows that may have been charged without a confirmation."""
        return await self._ledger.query_rows(list, RowState.UNKNOWN)

    async def resubmit(self, key: str) -> None:
        """Let the next run submit the unknown row *key* again. It may be charged twice."""
        await self._ledger.transition(key, RowState.REQUEUED)

    async def abandon(self, key: str) -> None:
        """Give up the unknown row *key*. It counts as failed and is never submitted again."""
        await self._ledger.transition(key, RowState.ABANDONED)

    async def bind(self, key: str, task_id: str) -> None:
        """Record the task id of the unknown row *key*, known from a log, a callback or the service's support.

        Raises:
            LedgerError: The row is not unknown, or another row has that task.
        """
        await self._ledger.bind(key, self._client.task(task_id).task_id)

    async def _on_unmatched_callback(self, nonce: str, task_id: str) -> None:
        """Handle a callback without a pending submit, which may belong to an unknown row."""
        now_s = anyio.current_time()
        if now_s < self._last_confirm_s.get(
            nonce, -math.inf
        ) + _CONFIRM_INTERVAL_S or not await self._ledger.is_unresolved(nonce):
            return
        self._last_confirm_s[nonce] = now_s
        try:
            await self._client.task(task_id).query()
        except NanoBananaError as exc:
            _log.warning("task %s was named by a callback for an unknown row and cannot be confirmed: %s", task_id, exc)
        else:
            await self._ledger.bind_by_nonce(nonce, task_id)

    # --- all rows ---------------------------------------------------------------------------------------------------

    async def _registered_rows(self, rows: Rows) -> AsyncGenerator[tuple[BatchRow, LedgerRow | None]]:
        """Insert rows into the ledger, many per transaction, until the run stops. None marks a repeated key."""
        most = 1 if isinstance(rows, AsyncIterable) else _UPSERT_CHUNK  # the next one may arrive much later
        waiting: list[BatchRow] = []
        error: Exception | None = None
        async with contextlib.aclosing(with_keys(rows)) as all_rows:
            async for row in all_rows:
                if isinstance(row, Exception):
                    error = row
                elif row.key in self._seen_keys:
                    yield row, None
                else:
                    self._seen_keys.add(row.key)
                    waiting.append(row)
                if error is not None or len(waiting) >= most:
                    for pair in await self._register(waiting):
                        yield pair
                if self._run_state.stop_reason is not None:
                    return
        for pair in await self._register(waiting):
            yield pair
        if error is not None:
            raise error
        for pair in await self._leftover_rows():
            yield pair

    async def _leftover_rows(self) -> list[tuple[BatchRow, LedgerRow]]:
        """Return charged rows of earlier runs that are not saved and were not seen in this run."""
        found = await self._ledger.query_rows(list, RowState.SUBMITTED, RowState.SUCCEEDED)
        return [(_row_from_ledger(record), record) for record in found if record.key not in self._seen_keys]

    async def _register(self, waiting: list[BatchRow]) -> list[tuple[BatchRow, LedgerRow]]:
        entered = list(zip(waiting, await self._ledger.upsert_rows(waiting), strict=True))
        waiting.clear()
        return entered

    # --- one row ----------------------------------------------------------------------------------------------------

    async def _run_row(
        self, row: BatchRow, record: LedgerRow, *, retry_failed: bool, timeout_s: float | None
    ) -> Outcome | None:
        """Return the outcome of the row; None if the run stopped before it had one."""
        try:
            return await self._process_row(row, record, retry_failed=retry_failed, timeout_s=timeout_s)
        except RunStopped:
            return None
        except AuthenticationError as exc:
            self._run_state.stop(exc)
            return None
        except LedgerError:  # ends the whole run, because no outcome can be recorded
            raise
        except (NanoBananaError, ValueError) as exc:
            return outcome_from_error(exc, key=row.key, request=row.request)

    async def _process_row(
        self, row: BatchRow, record: LedgerRow, *, retry_failed: bool, timeout_s: float | None
    ) -> Outcome:
        if (outcome := previous_outcome(row, record, retry_failed=retry_failed)) is not None:
            return outcome
        if record.state is RowState.SAVED and await anyio.to_thread.run_sync(files_exist, record):
            return Succeeded(
                key=row.key, request=row.request, task=task_from_row(record), files=record.files, replayed=True
            )
        if record.state.is_submittable:
            handle = await self._submitter.submit(row)
            record = attrs.evolve(record, state=RowState.SUBMITTED)
        else:
            handle = self._client.task(record.task_id or "", submitted_at=to_datetime(record.submitted_at))
            self._run_state.pending += 1
            self._run_state.task_ids[row.key] = handle.task_id
        try:
            outcome = await self._complete_row(row, record, handle, timeout_s)
        except NanoBananaError as exc:
            exc.task_id = exc.task_id or handle.task_id
            if not isinstance(exc, LedgerError):
                del self._run_state.task_ids[row.key]
            raise
        else:
            del self._run_state.task_ids[row.key]
            return outcome
        finally:
            self._run_state.pending -= 1
            self._run_state.notify_all()

    async def _complete_row(
        self, row: BatchRow, record: LedgerRow, handle: TaskHandle, timeout_s: float | None
    ) -> Outcome:
        """Wait for the task, record its end, and save its images."""
        try:
            task = await handle.wait(timeout_s=timeout_s)
        except TaskNotFound as exc:
            if record.state in _HAS_IMAGE:
                raise
            await self._ledger.transition(row.key, RowState.UNKNOWN, reason=str(exc))
            raise SubmissionUnknown(str(exc)) from exc  # charged and lost: the user has to decide
        if record.state not in _HAS_IMAGE:
            await self._record_final(row, task)
        if not task.images:
            raise no_image_error(task)
        files = await self._save_images(record.file_stem, task, handle.task_id)
        await self._ledger.record_saved(row.key, files)
        return Succeeded(key=row.key, request=row.request, task=task, files=files)

    async def _record_final(self, row: BatchRow, task: Task) -> None:
        state = RowState.SUCCEEDED if task.images else RowState.FAILED
        consumed = None if task.consumed is None else f"{task.consumed:f}"
        reason = None if task.images else (task.reason or " ".join(task.texts) or "the service gave no reason")
        await self._ledger.transition(row.key, state, ended_at=time.time(), consumed=consumed, reason=reason)
        if consumed is not None or state is RowState.FAILED:
            self._budget.settle(row.request.model, task.consumed)

    async def _save_images(self, stem: str, task: Task, task_id: str) -> tuple[SavedImage, ...]:
        self._run_state.saving += 1
        try:
            try:
                return await self._write_images(stem, task)
            except ImageError as exc:
                if isinstance(exc.__cause__, OSError):  # the disk: every other image would fail, too
                    self._run_state.stop(exc)
                    raise RunStopped from None
                fresh = await self._client.task(task_id).query()  # the URL may have expired
                if not fresh.images:
                    raise
                return await self._write_images(stem, fresh)
        finally:
            self._run_state.saving -= 1
            self._run_state.notify_all()

    async def _write_images(self, stem: str, task: Task) -> tuple[SavedImage, ...]:
        names = [stem, *(f"{stem}.{number}" for number in range(2, len(task.images) + 1))]
        return tuple(
            [
                await self._client.store(image, self._image_store, name)
                for name, image in zip(names, task.images, strict=True)
            ]
        )


def _row_from_ledger(record: LedgerRow) -> BatchRow:
    request = GenerationRequest(record.prompt, model=record.model)
    return BatchRow(key=record.key, request=request, fingerprint=record.fingerprint)


def _ignore_unconsumed(_: Outcome) -> None:
    """Do nothing about an outcome that was not consumed: the next run yields it again."""


_HAS_IMAGE: Final = (RowState.SUCCEEDED, RowState.SAVED)
