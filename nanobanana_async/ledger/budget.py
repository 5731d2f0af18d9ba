"""`Budget`: what a run has spent, and what its submits may still cost. Credits are Decimal, never float."""

from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Self

import attrs


@attrs.frozen(kw_only=True)
class BudgetStatus:
    """State of the budget, in credits."""

    spent: Decimal
    """Credits that the service reported as charged, in all runs of the batch."""
    reserved: Decimal
    """Largest amount that submits in flight and submits with an unknown outcome may cost."""
    remaining: Decimal | None
    """Budget minus spent and reserved; None without a budget."""


class Budget:
    """Keeps spent and reserved credits at or below *budget*; None means no limit.

    A submit reserves the largest price seen for its model. Until one is known, submits go one at a time and reserve the
    largest price of any model. The first submit reserves nothing, because no price is known.
    """

    def __init__(self, budget: Decimal | None = None) -> None:
        self._budget = budget
        self._spent = Decimal(0)
        self._reserved_counts: Counter[str] = Counter()
        self._price: dict[str, Decimal] = {}

    @classmethod
    def from_attempts(cls, costs: Iterable[tuple[str, int, Decimal | None]], budget: Decimal | None = None) -> Self:
        """Return the budget of a ledger.

        *costs* has a tuple per attempt: model, number of submits that may still cost, and credits charged.
        """
        account = cls(budget)
        for model, unsettled, consumed in costs:
            account._reserved_counts[model] += unsettled
            if consumed is not None:
                account.reserve(model)
                account.settle(model, consumed)
        return account

    def can_reserve(self, model: str) -> bool:
        """Return whether one more submit stays within the budget, whatever the outcome of earlier ones."""
        if self._budget is None:
            return True
        if model not in self._price and (
            self._reserved_counts[model] or (not self._price and self._reserved_counts.total())
        ):
            return False
        return self._spent + self._reserved() + self._worst_case_price(model) <= self._budget

    def reserve(self, model: str) -> None:
        """Reserve the price of a submit that is about to be sent."""
        self._reserved_counts[model] += 1

    def settle(self, model: str, consumed: Decimal | None) -> None:
        """Settle one submit that cost *consumed*. None means nothing."""
        self._reserved_counts[model] -= 1
        if consumed is not None:
            self._spent += consumed
            self._price[model] = max(consumed, self._price.get(model, consumed))

    def max_price(self, model: str) -> Decimal | None:
        """Return the largest price seen for *model*, or None."""
        return self._price.get(model)

    def status(self) -> BudgetStatus:
        """Return the state of the budget."""
        reserved = self._reserved()
        left = None if self._budget is None else self._budget - self._spent - reserved
        return BudgetStatus(spent=self._spent, reserved=reserved, remaining=left)

    def _reserved(self) -> Decimal:
        return sum(
            (self._worst_case_price(model) * count for model, count in self._reserved_counts.items()), Decimal(0)
        )

    def _worst_case_price(self, model: str) -> Decimal:
        """Return the largest price seen for *model*, else for any model."""
        return self._price.get(model, max(self._price.values(), default=Decimal(0)))
