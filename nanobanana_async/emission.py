"""Pass events to the hook of the application."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from nanobanana_async.events import Event, EventHook, Finished, StatusChanged, Throttled
from nanobanana_async.models import Eta, ReasonKind, Task
from nanobanana_async.tracking.state import SubmitInfo

_log: Final = logging.getLogger("nanobanana_async")


def emit(hook: EventHook | None, event: Event) -> None:
    """Call the *hook* of the application, whose errors are logged."""
    if hook is not None:
        try:
            hook(event)
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - user code, such as `result()` of a cancelled future
            _log.exception("on_event failed for %r", event)


class ChangeEmitter:
    """Emits the event for each snapshot, and counts why tasks have no image."""

    def __init__(self, pass_on: Callable[[Event], None], classify: Callable[[Task], ReasonKind]) -> None:
        self._pass_on = pass_on
        self._classify = classify
        self.reasons: Final[Counter[ReasonKind]] = Counter()

    def __call__(self, info: SubmitInfo, task: Task, eta: Eta | None) -> None:
        """Emit the event for a snapshot."""
        if task.is_final and not task.images:
            self.reasons[self._classify(task)] += 1
        self._pass_on(to_event(info, task, eta))


def emit_throttled(pass_on: Callable[[Event], None], pause_s: float) -> None:
    """Emit that requests are paused."""
    pass_on(Throttled(key="", pause_s=pause_s))


def to_event(info: SubmitInfo, task: Task, eta: Eta | None) -> StatusChanged | Finished:
    """Return the event for a snapshot."""
    key = info.key or task.task_id
    if task.is_final:
        return Finished(key=key, owner=info.owner, task_id=task.task_id, task=task)
    return StatusChanged(key=key, owner=info.owner, task_id=task.task_id, task=task, eta=eta)
