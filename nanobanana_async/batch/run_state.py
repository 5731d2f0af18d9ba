"""`RunState`: the state shared by the rows of one run."""

from decimal import Decimal

import anyio
import attrs

from nanobanana_async.batch.outage import OutageBackoff
from nanobanana_async.errors import BudgetExceeded, NanoBananaError, RateLimited
from nanobanana_async.ledger.budget import Budget, BudgetStatus, PricedAs, Reservation


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
    """What the rows of a run share: money, the state of the service, and the reason to stop.

    Args:
        budget: Credits that may be spent; None means no limit.
        max_price: Upper bound of a price that was not seen yet; None if unknown.
        max_downloads: Number of images that are saved at once. While more wait, submits wait, too.
    """

    def __init__(self, budget: Decimal | None, max_price: Decimal | None, max_downloads: int) -> None:
        self.budget = Budget(budget, max_price=max_price, on_change=self.notify_all)
        self.outage = OutageBackoff()
        self.last_error: str | None = None
        """Error of the last submit, while the run backs off."""
        self.in_flight = 0
        """Rows that are submitted and not saved."""
        self.saving = 0
        """Rows whose image is being saved."""
        self.stop_reason: NanoBananaError | None = None
        """Why the run has stopped; None while it takes rows."""
        self._max_downloads = max_downloads
        # A new event per change, not a condition: changes are made in `finally` blocks, which must not await.
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

    @property
    def has_download_queue(self) -> bool:
        """Whether more images wait than are saved at once, so that submits wait."""
        return self.saving > self._max_downloads

    async def reserve(self, priced_as: PricedAs) -> Reservation:
        """Wait until one more submit is allowed by outage, downloads and budget, and reserve its price.

        The run stops if the budget does not allow it, and no submit is left whose end could.
        """
        with anyio.move_on_after(self.outage.backoff_s()):
            while True:
                await self.wait_change()
        while True:
            self.raise_if_stopped()
            if not self.has_download_queue:
                if (reservation := self.budget.try_reserve(priced_as)) is not None:
                    return reservation
                if not self.budget.open:
                    self.stop(BudgetExceeded(self.budget.refusal(priced_as, "--max-price CREDITS")))
            await self.wait_change()

    def record_success(self) -> None:
        """Record that a submit was accepted."""
        self.outage.record_success()
        self.last_error = None
        self.notify_all()

    def record_failure(self, exc: NanoBananaError) -> None:
        """Record a submit that failed for a reason that is not its row's. After an hour of them the run stops."""
        now_s = anyio.current_time()
        self.outage.record_failure(now_s)
        self.last_error = str(exc) if self.outage.is_probing else None
        if self.outage.should_give_up(now_s, rate_limited=isinstance(exc, RateLimited)):
            self.stop(exc)
