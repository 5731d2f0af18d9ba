"""`RunState`: the state shared by the rows of one run."""

from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Final, TypeVar

import anyio
import attrs

from nanobanana_async.batch.outage import OutageBackoff
from nanobanana_async.errors import BudgetExceeded, ImageError, NanoBananaError, RateLimited
from nanobanana_async.ledger.budget import Budget, BudgetStatus, PricedAs, Reservation

T = TypeVar("T")

_MAX_TRIES: Final = 3
"""How often one image is tried again while downloads fail for all rows."""


@attrs.frozen(kw_only=True)
class BatchProgress:
    """A snapshot of a run.

    Attributes:
        succeeded: Rows with an image.
        failed: Rows without an image.
        unknown: Rows that may have been charged, and whose image cannot be had.
        running: Rows whose wait has timed out. Their tasks are charged, and the next run waits for them again.
        replayed: Outcomes among those above that are from an earlier run.
        in_flight: Submitted and not saved.
        is_learning_price: Whether submits wait until the first image of its kind tells its price.
        budget: State of the budget.
        last_error: Error of the last submit or download while the run backs off; None otherwise.
    """

    succeeded: int
    failed: int
    unknown: int
    running: int
    replayed: int
    in_flight: int
    is_learning_price: bool
    budget: BudgetStatus
    last_error: str | None


class _TryAgain(Exception):
    """Downloads fail for every row, so that a failure says nothing about this one."""

    def __init__(self, error: ImageError) -> None:
        super().__init__(str(error))
        self.error = error


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
        """Of submits."""
        self._download_outage = OutageBackoff()
        self._download_lock = anyio.Lock()
        self.last_error: str | None = None
        """Error of the last submit or download, while the run backs off."""
        self.is_learning_price = False
        """Whether a submit waits for the price of its kind, which the budget needs."""
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
        """Whether submits wait for images: more wait than are saved at once, or the last ones could not be had."""
        return self.saving > self._max_downloads or (self._download_outage.is_down and self.in_flight > 0)

    @property
    def is_probing(self) -> bool:
        """Whether submits go one at a time, because the last ones failed, or their images could not be had."""
        return self.outage.is_probing or self._download_outage.is_down

    async def reserve(self, priced_as: PricedAs, *, waits_for_money: bool = True) -> Reservation:
        """Wait until one more submit is allowed by outage, downloads and budget, and reserve its price.

        The run stops if the budget does not allow it, and no submit is left whose end could.

        Raises:
            BudgetExceeded: The budget does not allow it now, and *waits_for_money* is false.
        """
        with anyio.move_on_after(max(self.outage.backoff_s(), self._download_outage.backoff_s())):
            while True:
                await self.wait_change()
        while True:
            self.raise_if_stopped()
            if not self.has_download_queue:
                if (reservation := self.budget.try_reserve(priced_as)) is not None:
                    self.is_learning_price = False
                    return reservation
                if not waits_for_money:
                    raise BudgetExceeded(self.budget.refusal(priced_as, "--max-price CREDITS"))
                self.is_learning_price = self.budget.price(priced_as) is None
                if not self.budget.open:
                    self.stop(BudgetExceeded(self.budget.refusal(priced_as, "--max-price CREDITS")))
            await self.wait_change()

    async def download(self, fetch: Callable[[], Awaitable[T]], *, is_new: bool) -> T:
        """Return the result of *fetch*, which saves the images of one row.

        If several downloads of new images in a row have failed, no row is submitted while others are in flight, and one
        download at a time is tried again, three times each. The run stops as for a service that is down. *is_new* is
        false for images whose URL may have expired, or that need no download. Their failure says nothing about others.

        Raises:
            ImageError: The images cannot be downloaded, and others can.
            RunStopped: The run has stopped.
        """
        self.saving += 1
        tries = 0
        try:
            while True:
                try:
                    if not is_new or not self._download_outage.is_down:
                        return await self._try_download(fetch, is_new=is_new)
                    async with self._download_lock:
                        if self._download_outage.is_down:
                            tries += 1
                            with anyio.move_on_after(self._download_outage.backoff_s()):
                                while True:
                                    await self.wait_change()
                            return await self._try_download(fetch, is_new=is_new)
                except _TryAgain as exc:
                    if tries >= _MAX_TRIES:  # it may be this image alone, and others find out
                        raise exc.error from None
        finally:
            self.saving -= 1
            self.notify_all()

    async def _try_download(self, fetch: Callable[[], Awaitable[T]], *, is_new: bool) -> T:
        try:
            found = await fetch()
        except ImageError as exc:
            if isinstance(exc.__cause__, OSError):  # the disk: every other image would fail, too
                self.stop(exc)
                raise RunStopped from None
            if not is_new:
                raise
            now_s = anyio.current_time()
            self._download_outage.record_failure(now_s)
            if self._download_outage.should_give_up(now_s, rate_limited=False):
                self.stop(exc)
                raise RunStopped from None
            if not self._download_outage.is_down:
                raise
            self.last_error = str(exc)
            raise _TryAgain(exc) from None
        self._download_outage.record_success()
        self.last_error = self.last_error if self.outage.is_down else None
        return found

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
