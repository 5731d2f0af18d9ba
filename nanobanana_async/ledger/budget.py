"""`Budget` and `Reservation`: what a run has spent, and what its submits may still cost. Pure.

Credits are Decimal, never float. A price belongs to one model and one image size. It is learned from the positive
charge of a task that has an image, and from nothing else.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias

import attrs

from nanobanana_async._text import format_credits
from nanobanana_async.ledger.schema import AttemptCost

PricedAs: TypeAlias = tuple[str, str | None]
"""Model and image size of a request."""


@attrs.frozen(kw_only=True)
class BudgetStatus:
    """State of the budget, in credits.

    Attributes:
        spent: Credits that the service reported as charged, in all runs of the batch.
        reserved: Largest amount that submits in flight, and submits that may have been charged, may cost at
            known prices.
        unpriced: Submits that may cost something and are not in `reserved`, because no price is known for them.
        remaining: Budget minus spent and reserved; None without a budget. Negative if a price was higher than
            those before it.
    """

    spent: Decimal
    reserved: Decimal
    unpriced: int
    remaining: Decimal | None


class Budget:
    """Keeps spent and reserved credits at or below *limit*; None means no limit.

    A submit reserves the largest price seen for its model and size, or *max_price* if none was seen. Without either,
    at most one such submit may be unsettled. With more of them, from earlier runs, nothing is sent. So spending exceeds
    *limit* by at most one price, and after a price has risen, by the rise of the submits in flight.

    Args:
        limit: Credits that may be spent.
        max_price: Upper bound of a price that was not seen yet; None if unknown.
        on_change: Called after each change.
    """

    def __init__(
        self,
        limit: Decimal | None = None,
        *,
        max_price: Decimal | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit = limit
        self._max_price = max_price
        self._on_change = on_change
        self._spent = Decimal(0)
        self._prices: dict[PricedAs, Decimal] = {}
        self._held: Counter[PricedAs] = Counter()
        """Submits that may be charged, without an amount: those of `open`, and those nothing more is expected of."""
        self.open: Final[set[Reservation]] = set()
        """Reservations that are not decided."""

    def add_attempts(self, attempts: Iterable[AttemptCost]) -> None:
        """Count *attempts* of earlier runs."""
        for attempt in attempts:
            priced_as = (attempt.model, attempt.image_size)
            if attempt.consumed is not None:
                self._spent += attempt.consumed * attempt.count
                if attempt.is_success:
                    self.learn_price(priced_as, attempt.consumed)
            elif attempt.may_be_charged:
                self._held[priced_as] += attempt.count

    def learn_price(self, priced_as: PricedAs, consumed: Decimal) -> None:
        """Learn a price from what a task with an image was charged. Zero is no price."""
        if consumed > 0:
            self._prices[priced_as] = max(consumed, self._prices.get(priced_as, consumed))

    def price(self, priced_as: PricedAs) -> Decimal | None:
        """Return the price that a submit reserves, or None if it is not known."""
        return self._prices.get(priced_as, self._max_price)

    def try_reserve(self, priced_as: PricedAs) -> "Reservation | None":
        """Reserve one more submit. Return None if it could exceed the budget, whatever the outcome of earlier ones."""
        if self._limit is not None:
            price, status = self.price(priced_as), self.status()
            left = self._limit - status.spent - status.reserved
            if status.unpriced > 1 or ((left <= 0 or status.unpriced) if price is None else price > left):
                return None
        self._held[priced_as] += 1
        return self._open(priced_as)

    def reopen(self, priced_as: PricedAs) -> "Reservation":
        """Return the reservation of a submit of an earlier run, whose outcome is still expected."""
        return self._open(priced_as, was_sent=True)

    def status(self) -> BudgetStatus:
        """Return the state of the budget."""
        reserved, unpriced = Decimal(0), 0
        for priced_as, count in self._held.items():
            price = self.price(priced_as)
            reserved += (price or 0) * count
            unpriced += count if price is None else 0
        remaining = None if self._limit is None else self._limit - self._spent - reserved
        return BudgetStatus(spent=self._spent, reserved=reserved, unpriced=unpriced, remaining=remaining)

    def refusal(self, priced_as: PricedAs, advice: str) -> str:
        """Return why another submit is refused. *advice* says how to state the largest price."""
        status, price = self.status(), self.price(priced_as)
        spent = f"{format_credits(status.spent)} credits spent"
        spent += f", {format_credits(status.reserved)} reserved" if status.reserved else ""
        if price is not None or not status.unpriced:
            left = "nothing is left" if price is None else f"one more may cost {format_credits(price)}"
            return f"budget: another submit could exceed it: {spent}, and {left}"
        name = priced_as[0] if priced_as[1] is None else f"{priced_as[0]} at {priced_as[1]}"
        return (
            f"budget: the price of {name} is not known, and a submit of unknown price is running or may have been "
            f"charged: {spent}. "
            f"To go on, state the largest price of an image: pass {advice}."
        )

    def _open(self, priced_as: PricedAs, *, was_sent: bool = False) -> "Reservation":
        reservation = Reservation(priced_as, self._end, was_sent=was_sent)
        self.open.add(reservation)
        return reservation

    def _end(self, reservation: "Reservation", consumed: Decimal | None, *, is_held: bool, is_success: bool) -> None:
        if reservation not in self.open:
            raise RuntimeError("reservation: expected one decision, got a second one")
        self.open.remove(reservation)
        if not is_held:
            self._held[reservation.priced_as] -= 1
        if consumed is not None:
            self._spent += consumed
            if is_success:
                self.learn_price(reservation.priced_as, consumed)
        self._on_change()


class _End(Protocol):
    def __call__(
        self, reservation: "Reservation", consumed: Decimal | None, *, is_held: bool, is_success: bool
    ) -> None: ...


class Reservation:
    """The price of one submit, from before it is sent until it is known what was charged.

    A context manager. Exactly one of `settle`, `release` and `hold` decides about it. If none has when the block ends,
    a submit that was sent is held, and one that was not is released.
    """

    def __init__(self, priced_as: PricedAs, end: _End, *, was_sent: bool) -> None:
        self.priced_as: Final = priced_as
        self._end = end
        self.was_sent = was_sent
        """Whether the submit may have left."""
        self.is_decided = False

    def settle(self, consumed: Decimal | None, *, is_success: bool) -> None:
        """Replace the price by what the service says was charged. None is no statement: the submit is held."""
        self._decide(consumed, is_held=consumed is None, is_success=is_success)

    def release(self) -> None:
        """Give the price back: nothing was charged."""
        self._decide(None, is_held=False)

    def hold(self) -> None:
        """Keep the price reserved for good: the submit may have been charged, and nothing more is expected."""
        self._decide(None, is_held=True)

    def _decide(self, consumed: Decimal | None, *, is_held: bool, is_success: bool = False) -> None:
        self._end(self, consumed, is_held=is_held, is_success=is_success)
        self.is_decided = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_decided:
            self._decide(None, is_held=self.was_sent)
