"""`TaskHandle`: one task, for the application that waits for it."""

import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import datetime
from typing import Final, Protocol

import anyio

from nanobanana_async._text import format_credits
from nanobanana_async.api.operations import ServiceApi
from nanobanana_async.errors import LedgerError, NanoBananaError, NoImage, TaskFailed, TaskNotFound
from nanobanana_async.models import Eta, JsonValue, ReasonKind, Task, TaskStatus
from nanobanana_async.protocols import LedgerEntry, PendingCallback, TaskLedger
from nanobanana_async.tracking.schedule import NOT_FOUND_GRACE_S
from nanobanana_async.tracking.state import SubmitInfo
from nanobanana_async.tracking.tracker import TaskTracker

_log: Final = logging.getLogger("nanobanana_async")

_CONFIRM_INTERVAL_S: Final = 10.0


class HandleSource(Protocol):
    """What all handles of one client share. A handle keeps it alive, and with it the background work."""

    @property
    def api(self) -> ServiceApi:
        """Queries tasks."""
        ...

    @property
    def tracker(self) -> TaskTracker:
        """Waits for tasks."""
        ...

    @property
    def default_timeout_s(self) -> float:
        """Longest wait for a task."""
        ...

    @property
    def ledger(self) -> TaskLedger | None:
        """The durable record of single tasks; None without one."""
        ...

    @property
    def classify_reason(self) -> Callable[[Task], ReasonKind]:
        """Return why a final task has no image."""
        ...

    async def start(self) -> None:
        """Start the background work and open the ledger."""
        ...


class TaskHandle:
    """One task at the service. It holds no resources and can be created again from its `task_id`."""

    def __init__(
        self,
        source: HandleSource,
        task_id: str,
        *,
        submit_info: SubmitInfo = SubmitInfo(),
        submitted_at: datetime | None = None,
        possible_duplicates: int = 0,
        entry: LedgerEntry | None = None,
    ) -> None:
        self._source = source
        self._submit_info = submit_info
        self._entry = entry
        self._final: Task | None = None
        self.task_id: Final = task_id
        self.submitted_at: Final = submitted_at
        """When the submit was accepted, by this machine's clock; None if it was submitted elsewhere."""
        self.possible_duplicates: Final = possible_duplicates
        """Number of resubmits under the retry policy. Each earlier submit may also have been charged."""
        self.owner: Final = submit_info.owner
        """Whom the task is for; None if the application has not said, or if it was submitted elsewhere."""
        self.note: Final[JsonValue] = None if entry is None else entry.note
        """What the application has passed as `note`; None without a ledger, or if the ledger here has no such task."""

    @property
    def snapshot(self) -> Task | None:
        """The final task, as far as this handle or the ledger knows it; None if it is not known to be final.

        From the ledger it has no images. `result` queries the task again, which costs nothing.
        """
        return self._final or (None if self._entry is None else self._entry.snapshot)

    def eta(self) -> Eta | None:
        """Return the time left until the task is final, learned from tasks of its model and image size.

        It depends on the age of the task: one that is late may need longer than a new one. No I/O. None if the task is
        final, or if the time of its submit is not known.
        """
        if self._final is not None or self._source.tracker.cache.finished(self.task_id) is not None:
            return None
        if self._submit_info.submitted_at_s is None:
            return None
        return self._source.tracker.eta(self._submit_info)

    async def ack(self) -> None:
        """Record in the ledger that the application has used the result, so that `client.resume()` leaves it out.

        Returns once that is durable. A second call has no effect.

        Raises:
            LedgerError: The client has no ledger, the task is not in it, or it cannot be written.
        """
        if self._entry is not None:
            await self._entry.acknowledge()
        elif self._source.ledger is None:
            raise LedgerError(f"task {self.task_id}: the client has no ledger. Pass ledger=SqliteLedger(folder).")
        else:
            await self._source.start()
            if not await self._source.ledger.acknowledge(self.task_id, self._final):
                raise LedgerError(
                    f"task {self.task_id}: not in the files of the ledger that this process holds. The process that "
                    "has submitted it can acknowledge it."
                )

    def __repr__(self) -> str:
        return f"TaskHandle({self.task_id!r})"

    async def query(self) -> Task:
        """Query the task once and return the snapshot.

        A task that this client submitted and the service does not show yet is returned as pending. Raises as `wait`
        does, and `TransportError` if no response arrived.
        """
        if (final := self._final or self._source.tracker.cache.finished(self.task_id)) is not None:
            return self._remember(final)
        try:
            task = await self._source.api.query(self.task_id)
        except TaskNotFound:
            since_s = self._submit_info.submitted_at_s
            if since_s is None or anyio.current_time() - since_s > NOT_FOUND_GRACE_S:
                raise
            return Task(task_id=self.task_id, status=TaskStatus.PENDING)
        return self._remember(task)

    async def wait(self, *, timeout_s: float | None = None) -> Task:
        """Return the task once it is final, whether it succeeded or failed.

        All waiters of one task share its polls. Cancelling stops the wait, not the task.

        Args:
            timeout_s: Seconds to wait; None uses `Timeouts.task_s`.

        Raises:
            TaskTimeout: The time passed. `exc.task` is the last snapshot. The task keeps running: wait again.
            TaskNotFound: The service does not know the task.
            AuthenticationError: The service rejected the key.
        """
        return self._final or self._remember(await self._await_final(timeout_s))

    async def result(self, *, timeout_s: float | None = None) -> Task:
        """Return the task once it has succeeded with at least one image.

        Waits and raises as `wait` does. It also raises:

        Raises:
            TaskFailed: The task ended as failed.
            NoImage: It ended as success and was charged, but contains no image. See `exc.task.texts`.
        """
        task = self._final or self._remember(await self._await_final(timeout_s))
        if task.status is TaskStatus.FAILED or not task.images:
            raise no_image_error(task, self._source.classify_reason(task))
        return task

    async def updates(self, *, timeout_s: float | None = None) -> AsyncGenerator[Task]:
        """Yield a snapshot at each change of status, ending with the final one. Raises as `wait` does."""
        if self._final is not None:
            yield self._final
            return
        updates = self._source.tracker.updates(
            self.task_id, timeout_s=self._timeout_s(timeout_s), submit_info=self._submit_info
        )
        async with contextlib.aclosing(updates):
            async for task in updates:
                yield self._remember(task)

    def _await_final(self, timeout_s: float | None) -> Coroutine[object, object, Task]:
        # Not async: one frame per waiter is measurable with ten thousand waiters.
        return self._source.tracker.wait(
            self.task_id, timeout_s=self._timeout_s(timeout_s), submit_info=self._submit_info
        )

    def _timeout_s(self, timeout_s: float | None) -> float:
        check_timeout_s(timeout_s)
        return self._source.default_timeout_s if timeout_s is None else timeout_s

    def _remember(self, task: Task) -> Task:
        if task.is_final:
            self._final = self._final or task  # the first final status stays, whatever the service reports later
        return self._final or task


def check_timeout_s(timeout_s: float | None) -> None:
    """Raise ValueError if a wait could not end by *timeout_s*."""
    if timeout_s is not None and not 0 <= timeout_s < math.inf:  # false for nan, too
        raise ValueError(f"timeout_s: expected 0 or more seconds, got {timeout_s:g}")


async def recover_by_callback(
    callback: PendingCallback,
    make_handle: Callable[[str], TaskHandle],
    is_taken: Callable[[str], bool],
    timeout_s: float,
) -> TaskHandle | None:
    """Wait for the callback of a submit whose response was lost, and return its task.

    Returns None after *timeout_s*. The task id in a callback is accepted if the service knows the task, and no other
    submit has it (*is_taken*). The query is repeated every ten seconds, because a new task may be invisible at first.
    """
    claimed: str | None = None
    with anyio.move_on_after(timeout_s):
        while True:
            with anyio.move_on_after(math.inf if claimed is None else _CONFIRM_INTERVAL_S):
                claimed = await callback.wait_task_id()
            if not claimed or is_taken(claimed):
                continue
            handle = make_handle(claimed)
            with contextlib.suppress(NanoBananaError):
                await handle.query()
                return handle
    if claimed is not None:
        _log.warning("task %s was named by a callback, and the service does not know it", claimed)
    return None


def no_image_error(task: Task, kind: ReasonKind) -> TaskFailed | NoImage:
    """Return the error for a final *task* without an image, for a reason of this *kind*."""
    if task.status is TaskStatus.FAILED:
        reason = (task.reason or "the service gave no reason").rstrip(".")
        how = "was refused" if kind is ReasonKind.REFUSED else "failed"
        return TaskFailed(f"task {task.task_id} {how}: {reason}. {_charge(task)}", task=task, reason_kind=kind)
    detail = " ".join(task.texts) or task.reason or "the service gave no reason"
    what = "refused" if kind is ReasonKind.REFUSED else "contains no image"
    message = f"task {task.task_id} was charged and {what}: {detail[:500]}"
    return NoImage(message, task=task, reason_kind=kind)


def _charge(task: Task) -> str:
    if task.consumed is None:
        return "It may have been charged."
    return f"It was charged {format_credits(task.consumed)} credits." if task.consumed else "It was not charged."
