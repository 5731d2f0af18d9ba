"""Read and acknowledge single tasks from outside, without a ledger of one's own in the folder."""

import contextlib
from pathlib import Path

import anyio.to_thread

from nanobanana_async.errors import LedgerError
from nanobanana_async.ledger import tasks
from nanobanana_async.ledger.entry import TaskEntry
from nanobanana_async.ledger.lock import LockHeld
from nanobanana_async.ledger.task_file import TaskFile, read_elsewhere, task_files
from nanobanana_async.ledger.tasks import LedgerTask
from nanobanana_async.models import Task


async def read_tasks(folder: Path) -> list[LedgerTask]:
    """Return all tasks in *folder*, in the order of their submits. Holds nothing, and changes nothing.

    Raises:
        LedgerError: A file cannot be read.
    """
    try:
        found = await anyio.to_thread.run_sync(lambda: list(read_elsewhere(folder, [], tasks.select)))
    except ValueError as exc:
        raise LedgerError(str(exc)) from exc
    return tasks.in_order(found)


async def acknowledge(folder: Path, name: str, final: Task | None = None) -> bool:
    """Acknowledge a task by its task id or key, in a file of *folder* that no process holds. Else return False."""
    for path in await anyio.to_thread.run_sync(task_files, folder):
        try:
            file = await TaskFile.open_file(path, 0)
        except LockHeld:
            continue
        async with contextlib.aclosing(file):
            task = await file.commit(lambda db: tasks.find(db, name))
            if task is not None:
                await TaskEntry.of(file, task).acknowledge(final)
                return True
    return False
