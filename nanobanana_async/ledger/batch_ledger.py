"""`BatchLedger`: the record of a batch. Attempt, task id, end and file are each durable before the next step."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncGenerator, Container, Iterable
from functools import partial
from pathlib import Path
from typing import Final

from nanobanana_async.ledger import batch_rows, schema
from nanobanana_async.ledger.database import OpenDatabase, open_database
from nanobanana_async.ledger.restored import BatchChecks, find_file
from nanobanana_async.ledger.schema import AttemptCost, BatchRow, LedgerRow, RowState
from nanobanana_async.ledger.sqlite import GROUP_COMMIT_S, LedgerFile, check_group_commit_s
from nanobanana_async.models import ReasonKind, Task
from nanobanana_async.protocols import AttemptEnd
from nanobanana_async.saved import SavedImage

_PAGE_ROWS: Final = 100
"""Rows that are read at once, which takes about 2 ms."""


class BatchLedger(LedgerFile):
    """The ledger of one batch folder."""

    def __init__(
        self, path: Path, opened: OpenDatabase, group_commit_s: float, folder: Path, image_stems: frozenset[str]
    ) -> None:
        super().__init__(path, opened, group_commit_s)
        self.folder: Final = folder
        self._image_stems = image_stems

    @staticmethod
    async def open(
        folder: Path,
        *,
        ledger_folder: Path | None = None,
        adopt: bool = False,
        create: bool = True,
        group_commit_s: float = GROUP_COMMIT_S,
    ) -> "BatchLedger":
        """Open the ledger of *folder*. Attempts of an interrupted run become unknown.

        Args:
            folder: The folder of the batch.
            ledger_folder: Where the ledger is; None means where it was before, at first *folder*.
            adopt: Whether to accept a copied or restored ledger. Rows that it has lost become unknown.
            create: Whether to create the folder and the ledger if they are missing.
            group_commit_s: How long a write waits for others to share its fsync.

        Raises:
            LedgerError: Another process holds it, or it is damaged, a copy, restored, of a newer version, or missing.
            ValueError: *group_commit_s* is not between 0 and 1.
        """
        check_group_commit_s(group_commit_s)

        def open_file() -> "BatchLedger":
            path = find_file(folder, ledger_folder, create=create)
            checks = BatchChecks(path, folder, adopt=adopt)
            return BatchLedger(path, open_database(path, checks), group_commit_s, folder, checks.image_stems)

        return await BatchLedger._open(open_file)

    # --- one row ----------------------------------------------------------------------------------------------------

    async def upsert_rows(self, rows: Iterable[BatchRow], *, listing: int | None = None) -> list[LedgerRow | None]:
        """Return the ledger row of each of *rows*. New ones are inserted as ready.

        None stands for a row whose key an earlier row of the same *listing* has.
        """
        rows, stems = list(rows), self._image_stems

        def work(db: sqlite3.Connection) -> list[LedgerRow | None]:
            batch_rows.add_columns(db, dict.fromkeys(name for row in rows for name in row.columns))
            lines = [batch_rows.upsert_row(db, row, listing, stems) for row in rows]
            return [None if line is None else batch_rows.to_ledger_row(line, self.folder) for line in lines]

        return await self.commit(work)

    async def begin_listing(self) -> int:
        """Return the number of a new listing: the rows of one run."""
        return await self.commit(batch_rows.begin_listing)

    async def unlisted_rows(self, listing: int) -> list[LedgerRow]:
        """Return charged rows that are not saved, and are not in this *listing*."""
        return await self.query(
            lambda db: [batch_rows.to_ledger_row(line, self.folder) for line in batch_rows.unlisted(db, listing)]
        )

    async def begin_attempt(
        self, key: str, *, resubmit: bool = False, is_again: bool = False, nonce: str | None = None
    ) -> None:
        """Record that a POST is about to be sent.

        With *resubmit* it may follow an attempt of this run that may have been charged, and with *is_again* one that
        has an image. *nonce* identifies the callback of this submit.
        """
        begin = partial(schema.begin_attempt, key=key, resubmit=resubmit, is_again=is_again, nonce=nonce)
        await self.commit(begin, key)

    async def end_attempt(self, key: str, end: AttemptEnd, *, is_again: bool = False) -> None:
        """Record the end of the current attempt of *key*. *is_again* is that of its begin."""
        await self.commit(lambda db: schema.end_attempt(db, key, end, is_again=is_again), key)

    async def bind_by_nonce(self, nonce: str, task_id: str) -> None:
        """Record the task id of the submit with this *nonce*, if it is unknown."""
        await self.commit(lambda db: schema.bind_by_nonce(db, nonce, task_id))

    async def is_unresolved(self, nonce: str) -> bool:
        """Return whether the outcome of the submit with this *nonce* is unknown."""
        return await self.commit(lambda db: schema.is_unresolved(db, nonce))

    async def transition(self, key: str, state: RowState, **facts: str | float | None) -> None:
        """Set the state of the current attempt of *key*, and *facts* about it (columns of `attempts`)."""
        await self.commit(lambda db: schema.transition(db, key, state, facts), key)

    async def record_final(self, key: str, task: Task, reason_kind: ReasonKind | None) -> None:
        """Record that *task*, the task of *key*, is final. *reason_kind* says why it has no image."""
        await self.commit(lambda db: schema.record_final(db, key, task, reason_kind), key)

    async def resolve(self, key: str, state: RowState) -> None:
        """Decide about the unknown row *key*: `REQUEUED` or `ABANDONED`."""
        if state is RowState.ABANDONED:
            await self.commit(partial(schema.abandon, key=key), key)
        else:
            await self.transition(key, state)

    async def bind(self, key: str, task_id: str) -> None:
        """Record the task id of the unknown row *key*. Raises if another row has that task."""
        await self.commit(lambda db: schema.bind_task(db, key, task_id), key)

    async def record_saved(self, key: str, files: Iterable[SavedImage]) -> None:
        """Record that the images of *key* are saved."""
        listed = json.dumps(list(map(batch_rows.file_record, files)))
        await self.transition(key, RowState.SAVED, files=listed, saved_at=time.time(), reason=None)

    async def note_failure(self, key: str, reason: str) -> None:
        """Record why the image of *key*, which is charged, is not saved."""
        await self.commit(lambda db: batch_rows.note_failure(db, key, reason))

    # --- all rows ---------------------------------------------------------------------------------------------------

    async def pages(self, *states: RowState) -> AsyncGenerator[list[LedgerRow]]:
        """Yield the rows in order, all or those in *states*. Pages are small, so that writes do not wait for them."""
        last = await self.query(batch_rows.last_number)
        for first in range(1, last + 1, _PAGE_ROWS):
            numbers = (first, first + _PAGE_ROWS - 1)
            found = await self.query(partial(batch_rows.page, numbers=numbers, states=states, folder=self.folder))
            if found:
                yield found

    async def list_rows(self, *states: RowState) -> list[LedgerRow]:
        """Return the rows in order, all or those in *states*."""
        return [row async for page in self.pages(*states) for row in page]

    async def count_states(self, listed: Container[str]) -> Counter[tuple[RowState, bool]]:
        """Return the number of rows by state and whether their key is in *listed*."""
        return await self.query(partial(batch_rows.count_states, listed=listed))

    async def count_mismatches(self, listed: Container[str]) -> Counter[str]:
        """Return the number of mismatches of the saved images by kind, of rows whose key is in *listed*."""
        return await self.query(partial(batch_rows.count_mismatches, listed=listed))

    async def count_reasons(self, listed: Container[str]) -> Counter[str]:
        """Return the number of failed rows by the kind of their reason, of rows whose key is in *listed*."""
        return await self.query(partial(batch_rows.count_reasons, listed=listed))

    async def doubts(self) -> tuple[int, int]:
        """Return the sums of `possible_duplicates` and of `held_charges` of all rows."""
        return await self.query(batch_rows.doubts)

    async def columns(self) -> list[str]:
        """Return the columns of all files of the batch, in order."""
        return await self.query(batch_rows.columns)

    async def delimiter(self) -> str:
        """Return what separates the cells of the last file of the batch; a comma if it was no table."""
        return await self.query(batch_rows.delimiter)

    async def set_delimiter(self, delimiter: str) -> None:
        """Record what separates the cells of the file."""
        await self.commit(lambda db: batch_rows.set_delimiter(db, delimiter))

    async def attempt_costs(self) -> list[AttemptCost]:
        """Return what the attempts of all runs say about money."""
        return await self.query(lambda db: list(map(schema.to_attempt_cost, db.execute(schema.SELECT_COSTS))))

    async def service(self) -> batch_rows.ServiceIdentity | None:
        """Return the service that the ledger is about; None if it is new."""
        return await self.commit(batch_rows.service)

    async def set_service(self, base_url: str, account: str) -> None:
        """Record the service that the ledger is about. *account* is a digest of the key."""
        await self.commit(lambda db: batch_rows.set_service(db, base_url, account))
