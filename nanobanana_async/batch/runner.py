"""`Batch`: rows -> ledger -> client -> files. What it has begun it can go on with after anything."""

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
from nanobanana_async._concurrency.map_unordered import flow
from nanobanana_async.batch import report
from nanobanana_async.batch.resume import are_there, as_task, moment, of_earlier_run
from nanobanana_async.batch.rows import BatchRow, Rows, keyed
from nanobanana_async.batch.run_state import BatchProgress, ImageStore, RunState, RunStopped
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
from nanobanana_async.handle import TaskHandle, without_picture
from nanobanana_async.images.download import sweep
from nanobanana_async.ledger.budget import Budget
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.ledger.sqlite import Ledger
from nanobanana_async.models import CallbackSource, GenerationRequest, SavedImage, Task
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown, of_error

_ENTERED_AT_ONCE: Final = 100
_log: Final = logging.getLogger("nanobanana_async")
_HEARD_S: Final = 10.0
"""Between two queries that callbacks about one unknown row cause."""
_REPORT_S: Final = 60.0
"""How old the page and the manifest may be, for those who look in the night."""


class Batch:
    """A folder of pictures in the making, and its ledger. Make it with `Batch.open`.

    However a run ended, the next one over the same rows goes on: what is paid is fetched, what is unknown is left
    alone, the rest is submitted. No key is kept in the folder.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: NanoBananaClient,
        account: Budget,
        fetcher: ImageStore | None,
        callback: CallbackSource | None,
    ) -> None:
        self.folder: Final = ledger.folder
        self._ledger = ledger
        self._client = client
        self._account = account
        self._fetcher: ImageStore = fetcher or client
        self._host = BackgroundTaskGroup()
        self._traffic = RunState()
        self._submitter = Submitter(ledger, client, account, self._traffic, callback)
        self._ended: Counter[type[Outcome] | str] = Counter()
        self._heard_s: dict[str, float] = {}
        self._met: set[str] = set()
        """Keys of this run: paid rows that have none of them are fetched at its end."""
        self._callback = callback
        if callback is not None:
            callback.strangers.append(self._hear)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        folder: str | os.PathLike[str],
        client: NanoBananaClient,
        *,
        budget: Decimal | None = None,
        fetcher: ImageStore | None = None,
        callback: CallbackSource | None = None,
    ) -> AsyncGenerator["Batch"]:
        """Open the batch in *folder*, made if missing. Leaving the block settles it: see `aclose`.

        Args:
            folder: Where pictures and ledger go. One process at a time.
            client: What submits and waits. It stays open.
            budget: Credits that may be spent here, by all runs together. New submits stop before what is spent and
                what those in flight may cost (the largest price seen for their model) could exceed it.
            fetcher: Who writes the pictures; None is the client.
            callback: A `CallbackReceiver`, as for `client.submit`. A callback also tells what became of an unknown
                row, whenever it comes.

        Raises:
            LedgerError: Another process has the folder (`exc.pid`), or its ledger cannot be used.
        """
        ledger = await Ledger.open(Path(folder))
        try:
            await anyio.to_thread.run_sync(sweep, ledger.folder)
            batch = cls(ledger, client, Budget.of(await ledger.costs(), budget), fetcher, callback)
        except BaseException:
            await ledger.aclose()
            raise
        try:
            await batch._host.ensure()
            batch._host.start_soon(batch._report_now_and_then)
            yield batch
        finally:
            await batch.aclose()

    async def run(
        self, rows: Rows, *, max_in_flight: int = 200, retry_failed: bool = False, timeout_s: float | None = None
    ) -> AsyncGenerator[Outcome]:
        """Yield what becomes of each of *rows*, as each ends; nothing a row meets ends the run.

        Rows that an earlier run had come to the end of are yielded again, marked `earlier`: a program that died
        between a picture and its own use of it is told once more. Rows of earlier runs that are paid, not fetched, and
        no longer among *rows* come last.

        Args:
            rows: `BatchRow`s (from `read_rows`), requests or prompts. Taken as there is room.
            max_in_flight: Rows under way, or ended and not yet yielded. A slow consumer slows the submits.
            retry_failed: Submit failed rows once more; each may be paid again.
            timeout_s: Seconds to wait for each picture; None takes `Timeouts.task_s`. One that is not final by then
                is `Failed` with `TaskTimeout`, and the next run goes on waiting.

        Raises, after the last outcome, what keeps the run from submitting more:
            AuthenticationError, InsufficientCredits: By the service.
            BudgetExceeded: One more picture could cost too much.
            LedgerError: The disk would not take what must be written.
            ImageError: The disk would not take a picture.
            NotSent, RateLimited, ServiceUnavailable, SubmissionUnknown: No submit has worked for an hour, or ever.
        """
        await self._host.ensure()

        async def work(entered: tuple[BatchRow, LedgerRow | None]) -> Outcome | None:
            row, record = entered
            if record is None:
                error = ConfigurationError(f"row {row.key}: another row has this key, too")
                return Failed(key=row.key, request=row.request, error=error)
            outcome = await self._tried(row, record, retry_failed=retry_failed, timeout_s=timeout_s)
            if outcome is not None:
                self._ended[type(outcome)] += 1
                self._ended["earlier"] += outcome.earlier
            return outcome

        self._met.clear()
        outcomes: AsyncGenerator[Outcome] = flow(
            self._host, self._entered(rows), work, at_once=max_in_flight, unread=_in_the_ledger
        )
        async with contextlib.aclosing(outcomes):
            async for outcome in outcomes:
                yield outcome
        if self._traffic.cause is not None:
            raise self._traffic.cause

    @property
    def in_flight(self) -> Mapping[str, str]:
        """Row key to task id of what is paid and not on disk. After a `LedgerError`, the last place that has them."""
        return self._traffic.tasks

    def progress(self) -> BatchProgress:
        """Return how it stands. No disk, no network."""
        ended = self._ended
        return BatchProgress(
            done=ended[Succeeded],
            failed=ended[Failed],
            unknown=ended[Unknown],
            earlier=ended["earlier"],
            in_flight=len(self._traffic.tasks),
            funds=self._account.funds(),
            trouble=self._submitter.trouble,
        )

    async def aclose(self) -> None:
        """Settle and close: take no more rows, let submits on the wire end within `Timeouts.submit_s`, stop waiting.

        What is paid and not on disk is fetched by the next run. `index.html` and `manifest.jsonl` are written.
        From any task; twice is harmless.
        """
        timeouts = self._client.timeouts
        self._traffic.stop(ConfigurationError("the batch was closed"))
        with anyio.move_on_after(timeouts.submit_s + timeouts.close_s, shield=True):
            try:
                await self._host.aclose(drain_s=0)
                await self._report()
            finally:
                if self._callback is not None and self._hear in self._callback.strangers:
                    self._callback.strangers.remove(self._hear)
                await self._ledger.aclose()

    async def _report(self) -> None:
        def write(records: Iterator[LedgerRow]) -> OSError | None:
            try:
                report.write(self.folder, records)
            except OSError as exc:  # no trouble of the ledger's, which can make all of it again, any time
                return exc
            return None

        with contextlib.suppress(LedgerError):
            if (trouble := await self._ledger.read(write)) is not None:
                _log.warning("%s cannot be written: %s", report.PAGE, trouble)

    async def _report_now_and_then(self) -> None:
        while True:
            await anyio.sleep(_REPORT_S)
            await self._report()

    # --- what nobody knows the end of -------------------------------------------------------------------------------

    async def unknown(self) -> list[LedgerRow]:
        """Return the rows that may have been paid, and for which nothing says so."""
        return await self._ledger.read(list, RowState.UNKNOWN)

    async def resubmit(self, key: str) -> None:
        """Have the next run submit this unknown row once more, though it may be paid twice then."""
        await self._ledger.move(key, RowState.REOPENED)

    async def abandon(self, key: str) -> None:
        """Give this unknown row up: it counts as failed from now on, and is never submitted again."""
        await self._ledger.move(key, RowState.ABANDONED)

    async def bind(self, key: str, task_id: str) -> None:
        """Tell which task this unknown row is, if you know: from a log, a callback, or the service's support.

        Raises:
            LedgerError: The row is not unknown, or another row is that task.
        """
        await self._ledger.bind(key, self._client.task(task_id).task_id)

    async def _hear(self, nonce: str, task_id: str) -> None:
        """Take a callback about a submit that no expectation here is waited for: an unknown row's, perhaps."""
        now_s = anyio.current_time()
        if now_s < self._heard_s.get(nonce, -math.inf) + _HEARD_S or not await self._ledger.misses(nonce):
            return
        self._heard_s[nonce] = now_s
        try:
            await self._client.task(task_id).query()
        except NanoBananaError as exc:
            _log.warning("a callback says that an unknown row is task %s, which cannot be confirmed: %s", task_id, exc)
        else:
            await self._ledger.recognise(nonce, task_id)

    # --- all rows ---------------------------------------------------------------------------------------------------

    async def _entered(self, rows: Rows) -> AsyncGenerator[tuple[BatchRow, LedgerRow | None]]:
        """Enter rows in the ledger, many in one transaction, until something stops the run. None: its key was met."""
        most = 1 if isinstance(rows, AsyncIterable) else _ENTERED_AT_ONCE  # the next one may be long in coming
        waiting: list[BatchRow] = []
        error: Exception | None = None
        async with contextlib.aclosing(keyed(rows)) as all_rows:
            async for row in all_rows:
                if isinstance(row, Exception):
                    error = row
                elif row.key in self._met:
                    yield row, None
                else:
                    self._met.add(row.key)
                    waiting.append(row)
                if error is not None or len(waiting) >= most:
                    for pair in await self._enter(waiting):
                        yield pair
                if self._traffic.cause is not None:
                    return
        for pair in await self._enter(waiting):
            yield pair
        if error is not None:
            raise error
        for pair in await self._left_over():
            yield pair

    async def _left_over(self) -> list[tuple[BatchRow, LedgerRow]]:
        """Return rows of earlier runs that are paid, not fetched, and were not met in this one."""
        found = await self._ledger.read(list, RowState.SUBMITTED, RowState.SUCCESS)
        return [(_as_row(record), record) for record in found if record.key not in self._met]

    async def _enter(self, waiting: list[BatchRow]) -> list[tuple[BatchRow, LedgerRow]]:
        entered = list(zip(waiting, await self._ledger.enter(waiting), strict=True))
        waiting.clear()
        return entered

    # --- one row ----------------------------------------------------------------------------------------------------

    async def _tried(
        self, row: BatchRow, record: LedgerRow, *, retry_failed: bool, timeout_s: float | None
    ) -> Outcome | None:
        """Return what became of the row; None when the run stopped before it came to anything."""
        try:
            return await self._advance(row, record, retry_failed=retry_failed, timeout_s=timeout_s)
        except RunStopped:
            return None
        except AuthenticationError as exc:
            self._traffic.stop(exc)
            return None
        except LedgerError:  # ends the others, too: nothing that they come to can be written down
            raise
        except (NanoBananaError, ValueError) as exc:
            return of_error(exc, key=row.key, request=row.request)

    async def _advance(
        self, row: BatchRow, record: LedgerRow, *, retry_failed: bool, timeout_s: float | None
    ) -> Outcome:
        if (outcome := of_earlier_run(row, record, retry_failed=retry_failed)) is not None:
            return outcome
        if record.state is RowState.SAVED and await anyio.to_thread.run_sync(are_there, record):
            return Succeeded(key=row.key, request=row.request, task=as_task(record), files=record.files, earlier=True)
        if record.state.may_be_submitted:
            handle = await self._submitter.submit(row)
            record = attrs.evolve(record, state=RowState.SUBMITTED)
        else:
            handle = self._client.task(record.task_id or "", submitted_at=moment(record.submitted_at))
            self._traffic.pending += 1
            self._traffic.tasks[row.key] = handle.task_id
        try:
            outcome = await self._finish(row, record, handle, timeout_s)
        except NanoBananaError as exc:
            exc.task_id = exc.task_id or handle.task_id
            if not isinstance(exc, LedgerError):
                del self._traffic.tasks[row.key]
            raise
        else:
            del self._traffic.tasks[row.key]
            return outcome
        finally:
            self._traffic.pending -= 1
            self._traffic.change()

    async def _finish(self, row: BatchRow, record: LedgerRow, handle: TaskHandle, timeout_s: float | None) -> Outcome:
        """Wait for the task, write its end down, and have its picture on disk."""
        try:
            task = await handle.wait(timeout_s=timeout_s)
        except TaskNotFound as exc:
            if record.state in _ENDED_WELL:
                raise
            await self._ledger.move(row.key, RowState.UNKNOWN, reason=str(exc))
            raise SubmissionUnknown(str(exc)) from exc  # paid, and gone: people must say what to do about it
        if record.state not in _ENDED_WELL:
            await self._settle(row, task)
        if not task.images:
            raise without_picture(task)
        files = await self._save(record.stem, task, handle.task_id)
        await self._ledger.saved(row.key, files)
        return Succeeded(key=row.key, request=row.request, task=task, files=files)

    async def _settle(self, row: BatchRow, task: Task) -> None:
        state = RowState.SUCCESS if task.images else RowState.FAILED
        consumed = None if task.consumed is None else f"{task.consumed:f}"
        reason = None if task.images else (task.reason or " ".join(task.texts) or "the service gave no reason")
        await self._ledger.move(row.key, state, ended_at=time.time(), consumed=consumed, reason=reason)
        if consumed is not None or state is RowState.FAILED:
            self._account.end(row.request.model, task.consumed)

    async def _save(self, stem: str, task: Task, task_id: str) -> tuple[SavedImage, ...]:
        self._traffic.saving += 1
        try:
            try:
                return await self._write(stem, task)
            except ImageError as exc:
                if isinstance(exc.__cause__, OSError):  # the disk: no picture would fare better
                    self._traffic.stop(exc)
                    raise RunStopped from None
                fresh = await self._client.task(task_id).query()  # the link may have expired
                if not fresh.images:
                    raise
                return await self._write(stem, fresh)
        finally:
            self._traffic.saving -= 1
            self._traffic.change()

    async def _write(self, stem: str, task: Task) -> tuple[SavedImage, ...]:
        names = [stem, *(f"{stem}.{number}" for number in range(2, len(task.images) + 1))]
        return tuple(
            [
                await self._fetcher.save_picture(image, self.folder / name)
                for name, image in zip(names, task.images, strict=True)
            ]
        )


def _as_row(record: LedgerRow) -> BatchRow:
    request = GenerationRequest(record.prompt, model=record.model)
    return BatchRow(key=record.key, request=request, fingerprint=record.fingerprint)


def _in_the_ledger(_: Outcome) -> None:
    """Do nothing about an outcome that nobody took: the next run yields it again."""


_ENDED_WELL: Final = (RowState.SUCCESS, RowState.SAVED)
