"""`TaskEntry`: the record of one single task, from before its submit to its acknowledgement."""

import contextlib
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Self

from nanobanana_async.errors import BudgetExceeded, LedgerError, NotSent, SubmissionUnknown
from nanobanana_async.ledger import schema, tasks
from nanobanana_async.ledger.budget import PricedAs
from nanobanana_async.ledger.task_file import TaskFile
from nanobanana_async.ledger.tasks import LedgerTask, NewTask
from nanobanana_async.models import JsonValue, Task
from nanobanana_async.protocols import AttemptEnd, Verdict


class TaskEntry:
    """One single task of a file that this process holds. A `LedgerEntry`."""

    is_doubted = False
    """See `SubmitRecord.is_doubted`. An entry belongs to one call of `submit`, which keeps it itself."""

    def __init__(self, file: TaskFile, key: str, *, owner: str | None, note: JsonValue, priced_as: PricedAs) -> None:
        self.key: Final = key
        self.owner: Final = owner
        self.note: Final = note
        self.model: Final = priced_as[0]
        self.image_size: Final = priced_as[1]
        self.task_id: str | None = None
        self.submitted_at: datetime | None = None
        self.possible_duplicates = 0
        self.snapshot: Task | None = None
        self.acknowledged_s: float | None = None
        """When it was acknowledged by this process, on the monotonic clock."""
        self.file: Final = file
        self._new: NewTask | None = None
        self._on_accepted: Callable[[TaskEntry], None] = lambda _: None
        self._check_budget: Callable[[sqlite3.Connection], str | None] | None = None
        self._is_unknown = False
        """Whether an attempt may have been charged without a task id."""

    @classmethod
    def new(
        cls,
        file: TaskFile,
        new: NewTask,
        note: JsonValue,
        *,
        on_accepted: Callable[["TaskEntry"], None],
        check_budget: Callable[[sqlite3.Connection], str | None] | None,
    ) -> Self:
        """Return the entry of a task that is about to be submitted.

        *check_budget* says why an attempt is refused, or None. It runs in the transaction that records the attempt.
        """
        entry = cls(file, new.key, owner=new.owner, note=note, priced_as=new.priced_as)
        entry._new = new
        entry._on_accepted = on_accepted
        entry._check_budget = check_budget
        return entry

    @classmethod
    def of(cls, file: TaskFile, task: LedgerTask) -> Self:
        """Return the entry of a task in *file*."""
        entry = cls(file, task.key, owner=task.owner, note=task.note, priced_as=(task.model, task.image_size))
        entry.task_id = task.task_id
        entry.submitted_at = None if task.submitted_at is None else datetime.fromtimestamp(task.submitted_at, UTC)
        entry.possible_duplicates = max(0, task.possible_charges - 1)
        entry.snapshot = task.snapshot
        return entry

    @property
    def is_acknowledged(self) -> bool:
        """Whether this process has acknowledged it."""
        return self.acknowledged_s is not None

    async def begin_attempt(self, nonce: str | None) -> None:
        """See `SubmitRecord.begin_attempt`. Raises `BudgetExceeded` if the attempt could exceed the owner's budget."""
        new, self._new = self._new, None

        def work(db: sqlite3.Connection) -> str | None:
            if self._check_budget is not None and (refusal := self._check_budget(db)) is not None:
                return refusal
            if new is not None:
                tasks.insert_task(db, new, nonce)
            elif not schema.begin_attempt(db, self.key, resubmit=self._is_unknown, nonce=nonce):
                return "its state does not allow another attempt"
            return None

        try:
            refusal = await self.file.commit(work, is_checked=self._check_budget is not None)
        except LedgerError:
            raise
        except BaseException:  # `task.cancel()` reaches through the shield: the POST will not be sent
            with contextlib.suppress(LedgerError):  # checked, too, to stay behind the attempt
                self.file.enqueue(lambda db: schema.end_attempt(db, self.key, self._never_sent()), is_checked=True)
            raise
        if refusal is not None:
            raise BudgetExceeded(refusal) if new is not None else NotSent(f"not resubmitted: {refusal}")

    def _never_sent(self) -> AttemptEnd:
        reason = "the caller was cancelled before it was sent"
        error = SubmissionUnknown(reason) if self._is_unknown else NotSent(reason)
        return AttemptEnd(verdict=Verdict.NOT_CHARGED, rule="cancelled", error=error)

    async def end_attempt(self, end: AttemptEnd) -> None:
        """See `SubmitRecord.end_attempt`."""
        self._is_unknown = isinstance(end.error, SubmissionUnknown)
        if end.verdict is Verdict.UNKNOWN:
            self.possible_duplicates += 1
        elif end.rule == "callback":  # the attempt that was unknown is the accepted one
            self.possible_duplicates -= 1
        if end.task_id is not None:
            self.task_id, self.submitted_at = end.task_id, datetime.now(UTC)
        await self.file.commit(lambda db: schema.end_attempt(db, self.key, end), self.key)
        if end.task_id is not None:
            self._on_accepted(self)

    def record_final(self, task: Task) -> None:
        """Record that the task is final. Returns at once."""
        self.snapshot = task
        if not self.file.is_released:
            self.file.enqueue(lambda db: schema.record_final(db, self.key, task))

    async def acknowledge(self, final: Task | None = None) -> None:
        """Return once it is durable that the application has used the result, and its end if *final* is given.

        A second call has no effect.
        """
        if final is not None:
            self.record_final(final)
        if not self.is_acknowledged and not self.file.is_released:
            await self.file.commit(lambda db: tasks.acknowledge(db, self.key))
        self.acknowledged_s = self.acknowledged_s or time.monotonic()
