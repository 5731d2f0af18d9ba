"""`SessionOptions`: the policies and hooks of a client, checked together."""

import inspect
import logging
from collections.abc import Callable
from typing import Final

import attrs

from nanobanana_async.errors import ConfigurationError
from nanobanana_async.events import EventHook
from nanobanana_async.handle import TaskHandle
from nanobanana_async.models import ReasonKind, Task
from nanobanana_async.policies import (
    Limits,
    OwnerLimits,
    PollPolicy,
    ReferencePolicy,
    RegeneratePolicy,
    RetryPolicy,
    Timeouts,
)
from nanobanana_async.protocols import TaskLedger
from nanobanana_async.wire.refusals import classify_reason

_log: Final = logging.getLogger("nanobanana_async")


@attrs.frozen(kw_only=True)
class SessionOptions:
    """The policies and hooks of a client, as its arguments describe them."""

    limits: Limits
    retry: RetryPolicy
    regenerate: RegeneratePolicy
    references: ReferencePolicy
    polling: PollPolicy
    timeouts: Timeouts
    owner_limits: OwnerLimits | Callable[[str], OwnerLimits]
    on_event: EventHook | None
    on_orphan: Callable[[TaskHandle], None] | None

    def classify_reason(self, task: Task) -> ReasonKind:
        """Return why a final task has no image. See `RegeneratePolicy.classify`."""
        if self.regenerate.classify is None:
            return classify_reason(task)
        try:
            return ReasonKind(self.regenerate.classify(task))
        except Exception:  # noqa: BLE001 - user code; it is called by the tracker, which must go on
            _log.exception("RegeneratePolicy.classify failed for task %s", task.task_id)
            return ReasonKind.UNKNOWN

    def check(self, ledger: TaskLedger | None) -> None:
        """Raise `ConfigurationError` if the options cannot work, alone or with *ledger*."""
        if ledger is not None and not hasattr(ledger, "new_entry"):
            raise ConfigurationError(f"ledger: expected SqliteLedger(folder) or another TaskLedger, got {ledger!r:.80}")
        if inspect.iscoroutinefunction(self.on_event) or inspect.iscoroutinefunction(self.on_orphan):
            raise ConfigurationError("on_event, on_orphan: expected plain functions, got a coroutine function")
        if isinstance(self.owner_limits, OwnerLimits):
            _check_owner_limits(self.owner_limits, ledger)
        elif not callable(self.owner_limits):
            raise ConfigurationError(f"owner_limits: expected OwnerLimits or a function, got {self.owner_limits!r:.80}")


def _check_owner_limits(limits: object, ledger: object) -> None:
    if not isinstance(limits, OwnerLimits):
        raise ConfigurationError(f"owner_limits: expected a function that returns OwnerLimits, got {limits!r:.80}")
    if limits.budget is not None and ledger is None:
        raise ConfigurationError("owner_limits: a budget needs a ledger. Pass ledger=SqliteLedger(folder).")


def limits_of(given: OwnerLimits | Callable[[str], OwnerLimits], ledger: TaskLedger | None, owner: str) -> OwnerLimits:
    """Return the limits of *owner*, as the argument `owner_limits` of the client gives them."""
    limits = given if isinstance(given, OwnerLimits) else given(owner)
    _check_owner_limits(limits, ledger)
    return limits
