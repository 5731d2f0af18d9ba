"""`Budget`: what a run has spent and may still come to cost. Pure; credits are Decimal, never float."""

from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Self

import attrs


@attrs.frozen(kw_only=True)
class BudgetStatus:
    """How the account stands. Credits."""

    spent: Decimal
    """What the service said it charged, in all runs of the batch."""
    reserved: Decimal
    """What submits may still come to cost, or may have cost: those in flight, and those nobody knows the end of."""
    remaining: Decimal | None
    """Of the budget; None without one."""


class Budget:
    """Keeps what is spent and reserved at or below *budget*; None is no limit.

    A submit is reserved at the largest price seen for its model. Until one is known, one at a time is let through, at
    the largest price of any model; the very first one at none, for nobody knows what it costs.
    """

    def __init__(self, budget: Decimal | None = None) -> None:
        self._budget = budget
        self._spent = Decimal(0)
        self._reserved_counts: Counter[str] = Counter()
        self._price: dict[str, Decimal] = {}

    @classmethod
    def from_attempts(cls, costs: Iterable[tuple[str, int, Decimal | None]], budget: Decimal | None = None) -> Self:
        """Return the account of a ledger: model, submits that may yet cost something, and what it did cost."""
        account = cls(budget)
        for model, unsettled, consumed in costs:
            account._reserved_counts[model] += unsettled
            if consumed is not None:
                account.reserve(model)
                account.settle(model, consumed)
        return account

    def can_reserve(self, model: str) -> bool:
        """Tell whether one more submit keeps within the budget, whatever becomes of those before it."""
        if self._budget is None:
            return True
        if model not in self._price and (
            self._reserved_counts[model] or (not self._price and self._reserved_counts.total())
        ):
            return False
        return self._spent + self._reserved() + self._worst_case_price(model) <= self._budget

    def reserve(self, model: str) -> None:
        """Reserve for a submit that is about to leave."""
        self._reserved_counts[model] += 1

    def settle(self, model: str, consumed: Decimal | None) -> None:
        """Settle one submit: it has cost *consumed*; None is nothing."""
        self._reserved_counts[model] -= 1
        if consumed is not None:
            self._spent += consumed
            self._price[model] = max(consumed, self._price.get(model, consumed))

    def max_price(self, model: str) -> Decimal | None:
        """Return the largest price seen for *model*; None when none was."""
        return self._price.get(model)

    def status(self) -> BudgetStatus:
        """Return how it stands."""
        reserved = self._reserved()
        left = None if self._budget is None else self._budget - self._spent - reserved
        return BudgetStatus(spent=self._spent, reserved=reserved, remaining=left)

    def _reserved(self) -> Decimal:
        return sum(
            (self._worst_case_price(model) * count for model, count in self._reserved_counts.items()), Decimal(0)
        )

    def _worst_case_price(self, model: str) -> Decimal:
        """Return what one more may cost: the largest price seen for its model, or else for any."""
        return self._price.get(model, max(self._price.values(), default=Decimal(0)))
