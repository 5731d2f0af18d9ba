"""What happens to each request: frozen values for hooks, displays and streams."""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeAlias

import attrs

from nanobanana_async.errors import NanoBananaError
from nanobanana_async.models import Eta, Task
from nanobanana_async.saved import SavedImage


def _now() -> datetime:
    return datetime.now(UTC)


def new_key() -> str:
    """Return random text that identifies one call."""
    return secrets.token_hex(8)


@attrs.frozen(kw_only=True)
class _EventBase:
    key: str
    """Identifies the call that the event is about; the task id if this client did not submit the task."""
    owner: str | None = None
    """Whom the call is for; None if the application has not said."""
    task_id: str | None = None
    """The task, once it is accepted."""
    at: datetime = attrs.field(factory=_now)
    """When it happened, in UTC."""


@attrs.frozen(kw_only=True)
class Queued(_EventBase):
    """The request waits for its turn to be submitted.

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        position: Place in line: 1 is the next one.
        eta: Time left until the image; None if it is not known.
    """

    position: int
    eta: Eta | None = None


@attrs.frozen(kw_only=True)
class Submitted(_EventBase):
    """The service has accepted the request, and `task_id` is known.

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        possible_duplicates: Earlier POSTs of the same call that may have been charged.
    """

    possible_duplicates: int = 0


@attrs.frozen(kw_only=True)
class SubmitFailed(_EventBase):
    """The request was not accepted, or no response confirmed it (`SubmissionUnknown`).

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        error: Why it ended without a task.
    """

    error: NanoBananaError


@attrs.frozen(kw_only=True)
class StatusChanged(_EventBase):
    """The status of the task has changed and is not final.

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        task: The snapshot.
        eta: Time left until the image; None if it is not known.
    """

    task: Task
    eta: Eta | None = None


@attrs.frozen(kw_only=True)
class Finished(_EventBase):
    """The task is final: it has images, or it has failed.

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        task: The snapshot.
    """

    task: Task


@attrs.frozen(kw_only=True)
class Saved(_EventBase):
    """An image was checked and stored durably.

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        image: Where it was stored.
    """

    image: SavedImage


@attrs.frozen(kw_only=True)
class Throttled(_EventBase):
    """The service has asked for fewer requests (429). All requests of the client are paused. `key` is empty.

    Attributes:
        key: Identifies the call that the event is about; the task id if this client did not submit the task.
        owner: Whom the call is for; None if the application has not said.
        task_id: The task, once it is accepted.
        at: When it happened, in UTC.
        pause_s: Seconds for which requests are paused.
    """

    pause_s: float


Event: TypeAlias = Queued | Submitted | SubmitFailed | StatusChanged | Finished | Saved | Throttled

EventHook: TypeAlias = Callable[[Event], None]
"""A function that is called with each event of a client, on its event loop. It returns nothing and must not block."""
