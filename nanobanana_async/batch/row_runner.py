"""`RowRunner`: one row from its entry in the ledger to its outcome."""

from functools import partial

import anyio.to_thread
import attrs

from nanobanana_async.batch.resume import files_exist, previous_outcome, task_from_row, to_datetime
from nanobanana_async.batch.run_state import RunState, RunStopped
from nanobanana_async.batch.submitter import RowRecord, Submitter
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import (
    AuthenticationError,
    ImageError,
    LedgerError,
    NanoBananaError,
    NotSent,
    TaskLost,
)
from nanobanana_async.handle import TaskHandle, no_image_error
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.schema import BatchRow, LedgerRow, RowState
from nanobanana_async.models import Task
from nanobanana_async.outcomes import Outcome, Succeeded, outcome_from_error
from nanobanana_async.policies import RegeneratePolicy
from nanobanana_async.protocols import ImageStore
from nanobanana_async.regenerate import Generated, has_wrong_size, regenerate
from nanobanana_async.saved import SavedImage

_HAS_IMAGE = (RowState.SUCCEEDED, RowState.SAVED)


class RowRunner:
    """Runs rows of one batch. The options are those of `Batch.run`."""

    def __init__(
        self,
        client: NanoBananaClient,
        ledger: BatchLedger,
        run_state: RunState,
        submitter: Submitter,
        image_store: ImageStore,
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._run_state = run_state
        self._submitter = submitter
        self._image_store = image_store

    async def run(
        self, row: BatchRow, entry: LedgerRow, *, retry_failed: bool, timeout_s: float | None
    ) -> Outcome | None:
        """Return the outcome of the row; None if the run stopped before it had one."""
        try:
            if entry.state is RowState.UNKNOWN and entry.task_id is not None:
                entry = await self._look_again(entry)
            if (outcome := previous_outcome(row, entry, retry_failed=retry_failed)) is not None:
                return outcome
            if entry.state is RowState.SAVED and await anyio.to_thread.run_sync(files_exist, entry):
                task = task_from_row(entry)
                return Succeeded(key=row.key, request=row.request, task=task, files=entry.files, replayed=True)
            with self._submitter.record(row, entry) as record:
                return await self._complete(record, entry, timeout_s)
        except RunStopped:
            return None
        except AuthenticationError as exc:
            self._run_state.stop(exc)
            return None
        except LedgerError:  # ends the whole run, because no outcome can be recorded
            raise
        except (NanoBananaError, ValueError) as exc:
            return outcome_from_error(exc, key=row.key, request=row.request)

    async def _look_again(self, entry: LedgerRow) -> LedgerRow:
        """Query an unknown row that has an id. It may have been looked for in the wrong account."""
        try:
            await self._client.task(entry.task_id or "").query()
        except NanoBananaError:
            return entry
        await self._ledger.transition(entry.key, RowState.SUBMITTED)
        return attrs.evolve(entry, state=RowState.SUBMITTED)

    async def _complete(self, record: RowRecord, entry: LedgerRow, timeout_s: float | None) -> Outcome:
        """Return the outcome of the row, after as many attempts as the `RegeneratePolicy` of the client allows.

        A row that an earlier run has charged is only waited for.
        """
        policy = self._client.regenerate if entry.state.is_submittable else RegeneratePolicy()

        async def attempt(number: int) -> Generated:
            if number == 1:
                return await self._attempt(record, entry, timeout_s)
            record.begin_again()
            return await self._attempt(record, attrs.evolve(entry, state=RowState.READY), timeout_s)

        made = await regenerate(policy, attempt, has_wrong_size)
        return Succeeded(
            key=entry.key, request=record.row.request, task=made.task, files=made.files, earlier=made.earlier
        )

    async def _attempt(self, record: RowRecord, entry: LedgerRow, timeout_s: float | None) -> Generated:
        is_new = entry.state.is_submittable
        if is_new:
            handle = await self._submit(record)
        else:
            handle = self._client.task(entry.task_id or "", submitted_at=to_datetime(entry.submitted_at))
            if entry.consumed is None:
                record.reopen()
        self._run_state.in_flight += 1
        task: Task | None = None
        try:
            task = await self._wait(record, handle, timeout_s, has_image=entry.state in _HAS_IMAGE)
            files = await self._run_state.download(
                partial(self._save_images, record, entry, task), is_new=is_new and not task.has_inline_image
            )
            await self._ledger.record_saved(entry.key, files)
        except NanoBananaError as exc:
            exc.task_id = exc.task_id or handle.task_id
            if isinstance(exc, ImageError):
                exc.task = task
            raise
        finally:
            self._run_state.in_flight -= 1
            self._run_state.notify_all()
        return Generated(task, files)

    async def _submit(self, record: RowRecord) -> TaskHandle:
        try:
            return await self._submitter.submit(record)
        except RunStopped:
            if not record.is_again:
                raise
            raise NotSent("not submitted again: the run has stopped") from None

    async def _wait(self, record: RowRecord, handle: TaskHandle, timeout_s: float | None, *, has_image: bool) -> Task:
        """Wait for the task and record its end. Return it if it has an image."""
        try:
            task = await handle.wait(timeout_s=timeout_s)
        except TaskLost as exc:
            if not has_image:  # charged and lost: the user has to decide
                await self._ledger.transition(record.row.key, RowState.UNKNOWN, reason=str(exc))
            raise
        kind = None if task.images else self._client.classify_reason(task)
        if not has_image:
            await self._ledger.record_final(record.row.key, task, kind)
        if record.reservation is not None:
            record.reservation.settle(task.consumed, is_success=bool(task.images))
        if kind is not None:
            raise no_image_error(task, kind)
        return task

    async def _save_images(self, record: RowRecord, entry: LedgerRow, task: Task) -> tuple[SavedImage, ...]:
        try:
            try:
                return await self._store_images(record, entry.file_stem, task)
            except ImageError as exc:
                if isinstance(exc.__cause__, OSError):
                    raise
                fresh = await self._client.task(task.task_id).query()  # the URL may have expired
                if not fresh.images:
                    raise
                return await self._store_images(record, entry.file_stem, fresh)
        except ImageError as exc:
            await self._ledger.note_failure(entry.key, str(exc))
            raise

    async def _store_images(self, record: RowRecord, stem: str, task: Task) -> tuple[SavedImage, ...]:
        stem = f"{stem}.attempt-{record.number}" if record.is_again else stem
        names = [stem, *(f"{stem}.{number}" for number in range(2, len(task.images) + 1))]
        store = partial(self._client.store, store=self._image_store, task_id=task.task_id, request=record.row.request)
        return tuple([await store(image, name=name) for name, image in zip(names, task.images, strict=True)])
