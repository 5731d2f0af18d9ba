"""The outcome of each of many requests: `Succeeded`, `Failed` or `Unknown`. Frozen, made for `match`."""

import logging
from decimal import Decimal
from typing import Final, TypeAlias

import attrs

from nanobanana_async.errors import (
    ConfigurationError,
    ImageError,
    NanoBananaError,
    NoImage,
    SubmissionUnknown,
    TaskError,
    TaskFailed,
    TaskLost,
)
from nanobanana_async.models import GenerationRequest, Task
from nanobanana_async.saved import SavedImage

_log: Final = logging.getLogger("nanobanana_async")


@attrs.frozen(kw_only=True)
class _OutcomeBase:
    key: str
    """Key of the batch row. For `generate_many`, the position of the request, counted from 0."""
    request: GenerationRequest
    line: int | None = None
    """Line of the batch row in the file that it was read from; None if it was not read from a file."""
    replayed: bool = False
    """Whether the outcome is from an earlier run of the same batch."""
    earlier: tuple[Task, ...] = ()
    """Final tasks of earlier attempts of this run, each charged as it states."""

    @property
    def attempts(self) -> int:
        """Number of tasks that were submitted for the request in this run, each charged as it states."""
        return 1 + len(self.earlier)

    @property
    def consumed(self) -> Decimal | None:
        """Credits that the service has stated for all attempts of this run; None if for none."""
        tasks = (*self.earlier, self._last_task())
        stated = [task.consumed for task in tasks if task is not None and task.consumed is not None]
        return sum(stated, Decimal(0)) if stated else None

    def _last_task(self) -> Task | None:
        return None


@attrs.frozen(kw_only=True)
class Succeeded(_OutcomeBase):
    """The request produced an image.

    Attributes:
        key: Key of the batch row. For `generate_many`, the position of the request, counted from 0.
        request: The request.
        line: Line of the batch row in the file that it was read from; None if it was not read from a file.
        replayed: Whether the outcome is from an earlier run of the same batch.
        earlier: Final tasks of earlier attempts of this run (see `RegeneratePolicy`), each charged as it states.
        task: The final snapshot. If replayed, it has only what the ledger stores: no `images` and no `raw`.
        files: Files that a batch has written durably; () from `generate_many`.
    """

    task: Task
    files: tuple[SavedImage, ...] = ()

    def _last_task(self) -> Task | None:
        return self.task


@attrs.frozen(kw_only=True)
class Failed(_OutcomeBase):
    """The request produced no image. `error` is the reason. `error.task_id` is set if a task was accepted.

    Attributes:
        key: Key of the batch row. For `generate_many`, the position of the request, counted from 0.
        request: The request.
        line: Line of the batch row in the file that it was read from; None if it was not read from a file.
        replayed: Whether the outcome is from an earlier run of the same batch.
        earlier: Final tasks of earlier attempts of this run (see `RegeneratePolicy`), each charged as it states.
        error: Why there is no image.
    """

    error: NanoBananaError

    def _last_task(self) -> Task | None:
        return self.error.task if isinstance(self.error, TaskError | ImageError) else None

    @property
    def may_be_charged(self) -> bool:
        """Whether the service may have charged it without stating an amount."""
        if any(task.consumed is None for task in self.earlier):
            return True
        if isinstance(self.error, TaskFailed | NoImage):
            return self.error.task.consumed is None
        return isinstance(self.error, SubmissionUnknown) or self.error.task_id is not None


@attrs.frozen(kw_only=True)
class Unknown(_OutcomeBase):
    """The request may have been charged, and its image cannot be had. It is not resubmitted unless you request it.

    No response confirmed the submit (`SubmissionUnknown`), or the service has lost the task (`TaskLost`).

    Attributes:
        key: Key of the batch row. For `generate_many`, the position of the request, counted from 0.
        request: The request.
        line: Line of the batch row in the file that it was read from; None if it was not read from a file.
        replayed: Whether the outcome is from an earlier run of the same batch.
        earlier: Final tasks of earlier attempts of this run (see `RegeneratePolicy`), each charged as it states.
        error: Why it is not known whether there is one.
    """

    error: SubmissionUnknown | TaskLost


Outcome: TypeAlias = Succeeded | Failed | Unknown


def outcome_from_error(
    error: NanoBananaError | ValueError, *, key: str, request: GenerationRequest
) -> Failed | Unknown:
    """Return the outcome of a *request* that ended in *error*."""
    if isinstance(error, SubmissionUnknown | TaskLost):
        return Unknown(key=key, request=request, error=error, earlier=error.earlier)
    if isinstance(error, ValueError):  # `extra` contains a value that JSON cannot encode
        error = ConfigurationError(str(error))
    return Failed(key=key, request=request, error=error, earlier=error.earlier)


def log_unconsumed(outcome: Outcome) -> None:
    """Log an outcome that was not consumed, because the log is the last place that can keep its task id."""
    task_id = outcome.task.task_id if isinstance(outcome, Succeeded) else outcome.error.task_id
    if task_id is not None:
        _log.warning("task %s was charged, and its outcome was not consumed", task_id)
    elif isinstance(outcome, Unknown):
        _log.warning("submit may have been charged, and its outcome was not consumed: %s", outcome.error)
