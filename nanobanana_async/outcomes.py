"""What becomes of each of many requests: `Succeeded`, `Failed` or `Unknown`. Frozen, for `match`."""

import logging
from typing import Final, TypeAlias

import attrs

from nanobanana_async.errors import ConfigurationError, NanoBananaError, SubmissionUnknown
from nanobanana_async.models import GenerationRequest, SavedImage, Task

_log: Final = logging.getLogger("nanobanana_async")


@attrs.frozen(kw_only=True)
class _OutcomeBase:
    key: str
    """Of the row; of `generate_many`, the position of the request, counted from 0."""
    request: GenerationRequest
    replayed: bool = False
    """Whether an earlier run of the same batch had come to this already."""


@attrs.frozen(kw_only=True)
class Succeeded(_OutcomeBase):
    """There is a picture."""

    task: Task
    """The final snapshot. Of an earlier run, only what the ledger holds: no `images`, no `raw`."""
    files: tuple[SavedImage, ...] = ()
    """What a batch has written, durably; () from `generate_many`."""


@attrs.frozen(kw_only=True)
class Failed(_OutcomeBase):
    """There is no picture, and `error` says why. `error.task_id` is set when one was paid for."""

    error: NanoBananaError


@attrs.frozen(kw_only=True)
class Unknown(_OutcomeBase):
    """A submit may have been paid, and nothing says so. It is not sent again unless you say so."""

    error: SubmissionUnknown


Outcome: TypeAlias = Succeeded | Failed | Unknown


def outcome_from_error(
    error: NanoBananaError | ValueError, *, key: str, request: GenerationRequest
) -> Failed | Unknown:
    """Return what *request* has come to when it ended in *error*."""
    if isinstance(error, SubmissionUnknown):
        return Unknown(key=key, request=request, error=error)
    if isinstance(error, ValueError):  # `extra` holds what JSON cannot
        error = ConfigurationError(str(error))
    return Failed(key=key, request=request, error=error)


def log_unconsumed(outcome: Outcome) -> None:
    """Write down what nobody will read: the log is the last place that can hold a paid id."""
    task_id = outcome.task.task_id if isinstance(outcome, Succeeded) else outcome.error.task_id
    if task_id is not None:
        _log.warning("task %s was paid for, and nobody read how it ended", task_id)
    elif isinstance(outcome, Unknown):
        _log.warning("a submit may have been charged, and nobody read that: %s", outcome.error)
