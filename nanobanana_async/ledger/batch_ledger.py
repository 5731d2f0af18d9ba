"""`BatchLedger`: the record of a batch. Attempt, task id, end and file are each durable before the next step."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from nanobanana_async.ledger import batch_rows, schema
from nanobanana_async.ledger.database import OpenDatabase, open_database
from nanobanana_async.ledger.restored import BatchChecks, find_file
from nanobanana_async.ledger.schema import AttemptCost, BatchRow, LedgerRow, RowState
from nanobanana_async.ledger.sqlite import GROUP_COMMIT_S, LedgerFile, check_group_commit_s
from nanobanana_async.models import SavedImage, Task
from nanobanana_async.protocols import AttemptEnd

T = TypeVar("T")


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

    async def upsert_rows(self, rows: Iterable[BatchRow]) -> list[LedgerRow]:
        """Return the ledger row of each of *rows*. New ones are inserted as ready."""
        rows, stems = list(rows), self._image_stems
        return await self.commit(
            lambda db: [batch_rows.to_ledger_row(batch_rows.upsert_row(db, row, stems), self.folder) for row in rows]
        )

    async def begin_attempt(self, key: str, *, resubmit: bool = False, nonce: str | None = None) -> None:
        """Record that a POST is about to be sent.

        With *resubmit* it may follow an attempt of this run that may have been charged. *nonce* identifies the callback
        of this submit.
        """
        await self.commit(lambda db: schema.begin_attempt(db, key, resubmit=resubmit, nonce=nonce), key)

    async def end_attempt(self, key: str, end: AttemptEnd) -> None:
        """Record the end of the current attempt of *key*."""
        await self.commit(lambda db: schema.end_attempt(db, key, end), key)

    async def bind_by_nonce(self, nonce: str, task_id: str) -> None:
        """Record the task id of the submit with this *nonce*, if it is unknown."""
        await self.commit(lambda db: schema.bind_by_nonce(db, nonce, task_id))

    async def is_unresolved(self, nonce: str) -> bool:
        """Return whether the outcome of the submit with this *nonce* is unknown."""
        return await self.commit(lambda db: schema.is_unresolved(db, nonce))

    async def transition(self, key: str, state: RowState, **facts: str | float | None) -> None:
        """Set the state of the current attempt of *key*, and *facts* about it (columns of `attempts`)."""
        await self.commit(lambda db: schema.transition(db, key, state, facts), key)

    async def record_final(self, key: str, task: Task) -> None:
        """Record that *task*, the task of *key*, is final."""
        await self.commit(lambda db: schema.record_final(db, key, task), key)

    async def resolve(self, key: str, state: RowState) -> None:
        """Decide about the unknown row *key*: `REQUEUED` or `ABANDONED`."""
        await self.transition(key, state)

    async def bind(self, key: str, task_id: str) -> None:
        """Record the task id of the unknown row *key*. Raises if another row has that task."""
        await self.commit(lambda db: schema.bind_task(db, key, task_id), key)

    async def record_saved(self, key: str, files: Iterable[SavedImage]) -> None:
        """Record that the images of *key* are saved."""
        listed = json.dumps([[file.path.name, file.sha256, file.size_bytes] for file in files])
        await self.transition(key, RowState.SAVED, files=listed, saved_at=time.time())

    # --- all rows ---------------------------------------------------------------------------------------------------

    async def query_rows(self, use: Callable[[Iterator[LedgerRow]], T], *states: RowState) -> T:
        """Return the result of *use* on the rows in order, all or those in *states*. It runs in a thread."""
        where = f" WHERE coalesce(state, 'ready') IN ({', '.join('?' * len(states))})" if states else ""

        def work(db: sqlite3.Connection) -> T:
            found = db.execute(f"{schema.SELECT_ROWS}{where} ORDER BY number", states)
            return use(batch_rows.to_ledger_row(line, self.folder) for line in found)

        return await self.commit(work)

    async def attempt_costs(self) -> list[AttemptCost]:
        """Return what each attempt of all runs says about money."""
        return await self.commit(lambda db: list(map(schema.to_attempt_cost, db.execute(schema.SELECT_COSTS))))

    async def service(self) -> batch_rows.ServiceIdentity | None:
        """Return the service that the ledger is about; None if it is new."""
        return await self.commit(batch_rows.service)

    async def set_service(self, base_url: str, account: str) -> None:
        """Record the service that the ledger is about. *account* is a digest of the key."""
        await self.commit(lambda db: batch_rows.set_service(db, base_url, account))
