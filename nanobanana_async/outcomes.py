"""What becomes of each of many requests: `Done`, `Failed` or `Unknown`. Frozen, for `match`."""

from typing import TypeAlias

import attrs

from nanobanana_async.errors import NanoBananaError, SubmissionUnknown
from nanobanana_async.models import GenerationRequest, SavedPicture, Task


@attrs.frozen(kw_only=True)
class _Ended:
    key: str
    """Of the row; of `generate_many`, the position of the request, counted from 0."""
    request: GenerationRequest
    earlier: bool = False
    """Whether an earlier run of the same batch had come to this already."""


@attrs.frozen(kw_only=True)
class Done(_Ended):
    """There is a picture."""

    task: Task
    """The final snapshot. Of an earlier run, only what the ledger holds: no `images`, no `raw`."""
    files: tuple[SavedPicture, ...] = ()
    """What a batch has written, durably; () from `generate_many`."""


@attrs.frozen(kw_only=True)
class Failed(_Ended):
    """There is no picture, and `error` says why. `error.task_id` is set when one was paid for."""

    error: NanoBananaError


@attrs.frozen(kw_only=True)
class Unknown(_Ended):
    """A submit may have been paid, and nothing says so. It is not sent again unless you say so."""

    error: SubmissionUnknown


Outcome: TypeAlias = Done | Failed | Unknown
