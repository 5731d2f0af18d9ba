"""`SqliteLedger`: the durable record of single tasks, in a folder that several processes of one machine may share.

Each process writes into a file of its own. Files whose process has ended are taken over, and held until their tasks are
acknowledged. They are never merged.
"""

import json
import logging
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import anyio
import anyio.to_thread

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import schema, tasks
from nanobanana_async.ledger.budget import Budget, PricedAs
from nanobanana_async.ledger.entry import TaskEntry
from nanobanana_async.ledger.lock import LockHeld
from nanobanana_async.ledger.schema import AttemptCost
from nanobanana_async.ledger.sqlite import check_group_commit_s
from nanobanana_async.ledger.task_file import TaskFile, read_elsewhere, task_files
from nanobanana_async.ledger.tasks import LedgerTask
from nanobanana_async.models import GenerationRequest, JsonValue, Spending, Task, UnresolvedAttempt
from nanobanana_async.policies import OwnerLimits

T = TypeVar("T")

_log: Final = logging.getLogger("nanobanana_async")

TAKE_OVER_INTERVAL_S: Final = 30.0
"""How often a process looks for files whose process has ended."""
_GROUP_COMMIT_S: Final = 0.01
_PRUNE_INTERVAL_S: Final = 86_400.0
_MAX_RECENT: Final = 4096
_EXPECT_END_S: Final = 3600.0
"""How long the end of a task is expected that was acknowledged before it."""


class SqliteLedger:
    """A folder with the durable record of single tasks: pass it to `NanoBananaClient(ledger=...)`.

    Several processes of one machine may share the folder, each with a client. A folder on a network file system that
    several machines share is not supported. The files are readable by their user only, and contain no API key.

    Use it with `async with`, or leave that to the client, which opens it on first use and closes what it has opened.

    Args:
        folder: The folder, created if missing.
        store_requests: Whether to store the prompts.
        keep_days: How long acknowledged tasks are kept. What they have cost is kept for good.
        group_commit_s: How long a write waits for others to share its fsync, 0 to 1 second.

    Raises:
        ValueError: *keep_days* or *group_commit_s* cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        store_requests: bool = True,
        keep_days: float = 30.0,
        group_commit_s: float = _GROUP_COMMIT_S,
    ) -> None:
        check_group_commit_s(group_commit_s)
        if not 0 <= keep_days < 1e6:  # false for nan, too
            raise ValueError(f"keep_days: expected 0 or more days, got {keep_days:g}")
        self.folder: Final = Path(folder)
        self._store_requests = store_requests
        self._keep_s = keep_days * 86_400
        self._group_commit_s = group_commit_s
        self._files: list[TaskFile] = []
        """Files that this process holds. It writes new tasks into the first."""
        self._quiet: dict[Path, float] = {}
        """Files in which nothing was left to acknowledge, with the modification time of their lock."""
        self._open_entries: dict[str, TaskEntry] = {}
        """Entries of tasks that are not final, by task id."""
        self._recent_entries: FifoCache[TaskEntry] = FifoCache(_MAX_RECENT)
        self._opening = anyio.Lock()
        self._users = 0
        self._is_closed = False
        self._background = BackgroundTaskGroup()
        self._taken_over = anyio.Event()
        self._pruned_at = 0.0

    def __repr__(self) -> str:
        return f"SqliteLedger({str(self.folder)!r})"

    # --- open and close ---------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the ledger: hold a file of its own, and those whose process has ended. Or join those that use it.

        Raises:
            LedgerError: The folder cannot be used, one of its files is damaged, or the ledger was closed.
        """
        async with self._opening:
            if self._is_closed:
                raise LedgerError(f"{self.folder}: the ledger was closed. Create a new SqliteLedger.")
            if not self._users:
                try:
                    self._files.append(await TaskFile.open_first(self.folder, self._group_commit_s))
                    await self._take_over()
                    await self._background.ensure_started()
                    self._background.start_soon(self._maintain)
                except BaseException:
                    await self._close_files()
                    raise
            self._users += 1

    async def aclose(self) -> None:
        """Leave the ledger. The last user that leaves it writes what is pending and closes it."""
        self._users -= 1
        if self._users > 0 or self._is_closed:
            return
        self._is_closed = True
        with anyio.CancelScope(shield=True):
            await self._background.aclose(drain_s=0)
            await self._close_files()
            self._taken_over.set()  # ends `unacknowledged`

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _close_files(self) -> None:
        files, self._files = self._files, []
        with anyio.CancelScope(shield=True):
            for file in files:
                await file.aclose()

    async def _maintain(self) -> None:
        """Take over, release and prune files until the ledger is closed."""
        problem = ""
        while True:
            await anyio.sleep(TAKE_OVER_INTERVAL_S)
            try:
                async with self._opening:
                    await self._take_over()
            except (LedgerError, OSError) as exc:
                if str(exc) != problem:  # a damaged file stays damaged
                    problem = str(exc)
                    _log.error("ledger: %s", exc)

    async def _take_over(self) -> None:
        """Hold the files whose process has ended, and release those in which nothing is left to acknowledge."""
        held = {file.path for file in self._files}
        for path in await anyio.to_thread.run_sync(task_files, self.folder):
            if path in held or self._is_quiet(path):
                continue
            try:
                self._files.append(await TaskFile.open_file(path, self._group_commit_s))
            except LockHeld:
                continue
            self._taken_over.set()
            self._taken_over = anyio.Event()
        if time.time() - self._pruned_at > _PRUNE_INTERVAL_S:
            self._pruned_at = time.time()
            before = self._pruned_at - self._keep_s
            for file in self._files:
                await file.commit(lambda db: tasks.prune(db, before))
        self._forget_acknowledged()
        expected = {entry.file for entry in self._open_entries.values()}
        for file in self._files[1:]:
            if file not in expected and not await file.commit(tasks.expects_acknowledgement):
                file.is_released = True
                self._files.remove(file)
                await file.aclose()
                self._quiet[file.path] = _modified_at(file.path)

    def _forget_acknowledged(self) -> None:
        """Expect no end of tasks that were acknowledged before it, and that nothing polls any more."""
        before_s = time.monotonic() - _EXPECT_END_S
        for task_id, entry in list(self._open_entries.items()):
            if entry.acknowledged_s is not None and entry.acknowledged_s < before_s:
                del self._open_entries[task_id]

    def _is_quiet(self, path: Path) -> bool:
        return self._quiet.get(path) == _modified_at(path)

    # --- entries ----------------------------------------------------------------------------------------------------

    def new_entry(
        self,
        request: GenerationRequest,
        *,
        key: str,
        owner: str | None = None,
        note: JsonValue = None,
        limits: OwnerLimits = OwnerLimits(),
    ) -> TaskEntry:
        """Return the entry of a request that is about to be submitted. See `TaskLedger.new_entry`."""
        if not self._files:
            raise LedgerError(f"{self.folder}: the ledger is not open")
        new = tasks.NewTask(
            key=key,
            owner=owner,
            note=None if note is None else json.dumps(note),
            prompt=request.prompt if self._store_requests else "",
            priced_as=(request.model, request.image_size),
        )
        check = None if limits.budget is None else self._budget_check(new, limits)
        return TaskEntry.new(self._files[0], new, note, on_accepted=self._on_accepted, check_budget=check)

    def _on_accepted(self, entry: TaskEntry) -> None:
        if entry.task_id is not None:
            self._recent_entries.add(entry.task_id, entry)
            if entry.snapshot is None:
                self._open_entries[entry.task_id] = entry

    def find_entry(self, task_id: str) -> TaskEntry | None:
        """Return the entry of a task that this process has submitted or resumed lately; else None. No I/O."""
        return self._open_entries.get(task_id) or self._recent_entries.get(task_id)

    def observe(self, task: Task) -> None:
        """Record the end of *task* if it is final and an entry of this process. Returns at once."""
        if task.is_final and (entry := self._open_entries.pop(task.task_id, None)) is not None:
            try:
                entry.record_final(task)
            except LedgerError as exc:
                _log.warning("the end of task %s was not recorded: %s", task.task_id, exc)

    async def unacknowledged(self, *, follow: bool = False) -> AsyncGenerator[TaskEntry]:
        """Yield the entries of accepted tasks that are not acknowledged, oldest first.

        With *follow*, go on with those that are taken over from processes that have ended, until `ClientClosed` is
        raised.
        """
        seen: set[TaskFile] = set()
        while True:
            taken_over = self._taken_over
            for file in [file for file in self._files if file not in seen]:
                seen.add(file)
                if file.is_released:
                    continue
                listed = await file.commit(lambda db: tasks.select(db, tasks.UNACKNOWLEDGED))
                entries = [self._entry_of(file, task) for task in listed]  # all of them, to see each acknowledgement
                for entry in entries:
                    if not entry.is_acknowledged:
                        yield entry
            if not follow:
                return
            await taken_over.wait()
            self._background.check_open()

    def _entry_of(self, file: TaskFile, task: LedgerTask) -> TaskEntry:
        entry = self.find_entry(task.task_id or "") or TaskEntry.of(file, task)
        self._on_accepted(entry)
        return entry

    async def is_unresolved(self, nonce: str) -> bool:
        """Return whether a submit with this *nonce* may have been charged, and its task id is not known."""
        return any([await file.query(lambda db: schema.is_unresolved(db, nonce)) for file in list(self._files)])

    async def bind(self, nonce: str, task_id: str) -> TaskEntry | None:
        """Record the task id of the submit with this *nonce*, which its callback has named. See `TaskLedger.bind`."""
        for file in list(self._files):
            if await file.commit(lambda db: schema.bind_by_nonce(db, nonce, task_id)) is not None:
                task = await file.query(lambda db: tasks.find(db, task_id))
                return None if task is None else self._entry_of(file, task)
        return None

    async def unresolved(self) -> list[UnresolvedAttempt]:
        """Return the submits that may have been charged, whose task id is not known, and that are not acknowledged."""
        found: list[UnresolvedAttempt] = []
        for file in list(self._files):
            listed = await file.commit(lambda db: tasks.select(db, tasks.UNRESOLVED))
            found += [_to_unresolved(task, TaskEntry.of(file, task)) for task in listed]
        return found

    async def acknowledge(self, name: str, final: Task | None = None) -> bool:
        """Acknowledge the task with this task id or key, and record its end if *final* is given.

        Return False if no file that this process holds has it.
        """
        for file in list(self._files):
            if (task := await file.commit(lambda db: tasks.find(db, name))) is not None:
                await (self.find_entry(name) or TaskEntry.of(file, task)).acknowledge(final)
                return True
        return False

    # --- all processes ----------------------------------------------------------------------------------------------

    async def all_tasks(self) -> list[LedgerTask]:
        """Return all tasks of all processes that share the folder, in the order of their submits."""
        return tasks.in_order(await self._read_all(tasks.select))

    async def spending(self, owner: str | None = None, since: datetime | None = None) -> Spending:
        """Return what *owner* has spent since a time; all owners if None, since the beginning if None.

        It sums over all processes that share the folder. A *since* without time zone is local time.
        """
        since_s = 0.0 if since is None else since.timestamp()
        found = await self._read_all(lambda db: (tasks.costs(db, owner, since_s), list(tasks.prices(db))))
        costs = [cost for listed, _ in found for cost in listed]
        is_open, ended = Budget(), Budget()
        for priced_as, price in (pair for _, listed in found for pair in listed):
            is_open.learn_price(priced_as, price)
            ended.learn_price(priced_as, price)
        is_open.add_attempts(cost for cost in costs if cost.is_open)
        ended.add_attempts(cost for cost in costs if not cost.is_open)
        expected, known = is_open.status(), ended.status()
        return Spending(
            spent=known.spent + expected.spent,
            reserved=expected.reserved,
            unknown=known.reserved,
            unpriced=known.unpriced + expected.unpriced,
        )

    async def _read_all(self, read: Callable[[sqlite3.Connection], T]) -> list[T]:
        """Return the results of *read* on each file of the folder."""
        async with self._opening:
            await self._take_over()
        held = list(self._files)
        found = [await file.commit(read) for file in held]
        paths = [file.path for file in held]
        try:
            return found + await anyio.to_thread.run_sync(lambda: list(read_elsewhere(self.folder, paths, read)))
        except ValueError as exc:
            raise LedgerError(str(exc)) from exc

    def _budget_check(self, new: tasks.NewTask, limits: OwnerLimits) -> Callable[[sqlite3.Connection], str | None]:
        """Return a function that says why a submit is refused, or None. It runs in the transaction of its attempt."""

        def check(db: sqlite3.Connection) -> str | None:
            budget = Budget(limits.budget, max_price=limits.max_price)

            def read(one: sqlite3.Connection) -> tuple[list[AttemptCost], list[tuple[PricedAs, Decimal]]]:
                return tasks.costs(one, new.owner), list(tasks.prices(one))

            held = list(self._files)
            found = [read(db), *(file.read(read) for file in held[1:])]
            found += read_elsewhere(self.folder, [file.path for file in held], read)
            for costs, prices in found:
                budget.add_attempts(costs)
                for priced_as, price in prices:
                    budget.learn_price(priced_as, price)
            is_allowed = budget.try_reserve(new.priced_as) is not None
            if is_allowed:
                return None
            return f"owner {new.owner!r}: {budget.refusal(new.priced_as, 'OwnerLimits(max_price=...)')}"

        return check


def _to_unresolved(task: LedgerTask, entry: TaskEntry) -> UnresolvedAttempt:
    return UnresolvedAttempt(
        owner=task.owner,
        note=task.note,
        prompt=task.prompt,
        model=task.model,
        image_size=task.image_size,
        submitted_at=datetime.fromtimestamp(task.intended_at, UTC),
        reason=task.reason or "",
        possible_charges=task.possible_charges,
        key=task.key,
        acknowledge=entry.acknowledge,
    )


def _modified_at(path: Path) -> float:
    try:
        return path.with_suffix(".lock").stat().st_mtime
    except FileNotFoundError:
        return 0.0
