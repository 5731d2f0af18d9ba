"""`RunState`: the state shared by the rows of one run."""

import anyio
import attrs

from nanobanana_async.errors import NanoBananaError
from nanobanana_async.ledger.budget import BudgetStatus


@attrs.frozen(kw_only=True)
class BatchProgress:
    """A snapshot of a run."""

    succeeded: int
    failed: int
    unknown: int
    replayed: int
    """Outcomes among the three above that are from an earlier run."""
    in_flight: int
    """Submitted and not saved."""
    budget: BudgetStatus
    last_error: str | None
    """Error of the last submit while the run backs off; None otherwise."""


class RunStopped(Exception):
    """The run takes no more rows. `RunState.stop_reason` is the reason."""


class RunState:
    """Counters, and a way to wait for their change."""

    def __init__(self) -> None:
        self.pending = 0
        """Rows that have reserved credits and are not finished."""
        self.task_ids: dict[str, str] = {}
        """Task ids by row key, also of those that the ledger could not store."""
        self.saving = 0
        """Rows whose image is being saved."""
        self.stop_reason: NanoBananaError | None = None
        """Why the run has stopped; None while it takes rows."""
        self._changed = anyio.Event()

    def stop(self, cause: NanoBananaError) -> None:
        """Take no more rows. The first reason is kept."""
        self.stop_reason = self.stop_reason or cause
        self.notify_all()

    def raise_if_stopped(self) -> None:
        """Raise `RunStopped` if the run has stopped."""
        if self.stop_reason is not None:
            raise RunStopped

    def notify_all(self) -> None:
        """Wake all waiters after a change."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_change(self) -> None:
        """Return at the next change. Raise `RunStopped` if the run has stopped."""
        self.raise_if_stopped()
        await self._changed.wait()
        self.raise_if_stopped()
