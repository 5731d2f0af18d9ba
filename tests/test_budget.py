"""The budget of a batch, and its behaviour in an outage. Pure."""

import enum
from decimal import Decimal
from functools import partial
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async.batch.outage import GIVE_UP_AFTER_S, OutageBackoff
from nanobanana_async.ledger.budget import Budget, PricedAs, Reservation
from nanobanana_async.ledger.schema import AttemptCost

PRICE = Decimal("0.5")
SMALL, LARGE = ("m", "1k"), ("m", "4k")


def learned(budget: Budget, priced_as: PricedAs = SMALL, price: Decimal = PRICE) -> Budget:
    """Return *budget* after one success at *price*."""
    reservation = budget.try_reserve(priced_as)
    assert reservation is not None
    reservation.settle(price, is_success=True)
    return budget


def test_without_a_budget_everything_is_allowed() -> None:
    """Without a budget every submit is allowed and still counted."""
    budget = learned(Budget())
    assert all(budget.try_reserve(SMALL) and budget.try_reserve(LARGE) for _ in range(5))
    status = budget.status()
    assert (status.spent, status.reserved, status.unpriced, status.remaining) == (PRICE, PRICE * 5, 5, None)


def test_submits_go_one_at_a_time_until_a_price_is_known() -> None:
    """M2: a price belongs to one model and one size, and is never borrowed."""
    budget = Budget(Decimal(10))
    first = budget.try_reserve(SMALL)
    assert first is not None
    assert budget.try_reserve(SMALL) is None
    assert budget.try_reserve(LARGE) is None
    first.settle(PRICE, is_success=True)
    assert budget.try_reserve(SMALL) is not None
    assert budget.try_reserve(LARGE) is not None
    assert budget.try_reserve(LARGE) is None
    assert budget.try_reserve(SMALL) is not None


@pytest.mark.parametrize(
    ("consumed", "is_success"),
    [("0.000000", False), ("0", True), ("0.5", False)],
    ids=["zero", "zero-success", "failed"],
)
def test_only_a_positive_charge_of_a_success_teaches_a_price(consumed: str, *, is_success: bool) -> None:
    """M1: a failed task that costs nothing says nothing about an image."""
    budget = learned(Budget(Decimal(10)), price=Decimal(consumed)) if is_success else Budget(Decimal(10))
    if not is_success:
        reservation = budget.try_reserve(SMALL)
        assert reservation is not None
        reservation.settle(Decimal(consumed), is_success=False)
    assert budget.price(SMALL) is None
    assert budget.status().spent == Decimal(consumed)
    assert budget.try_reserve(SMALL) is not None
    assert budget.try_reserve(SMALL) is None


def test_a_charge_that_is_not_stated_is_held() -> None:
    """M3: it counts at the price, and at an unknown price no further submit is sent."""
    priced, unpriced = learned(Budget(Decimal("1.2"))), Budget(Decimal("1.2"))
    for budget in (priced, unpriced):
        reservation = budget.try_reserve(SMALL)
        assert reservation is not None
        reservation.settle(None, is_success=True)
        assert budget.try_reserve(SMALL) is None
    assert priced.status().reserved == PRICE
    assert (unpriced.status().reserved, unpriced.status().unpriced) == (Decimal(0), 1)


def test_an_upper_bound_stands_for_prices_that_are_not_known() -> None:
    """It lets several at a time through, and a known price takes its place."""
    budget = Budget(Decimal(3), max_price=Decimal(1))
    reservations = [budget.try_reserve(LARGE) for _ in range(4)]
    assert [reservation is not None for reservation in reservations] == [True, True, True, False]
    assert reservations[0] is not None
    reservations[0].settle(PRICE, is_success=True)
    assert budget.status().reserved == 2 * PRICE


def test_a_price_that_rises_stops_further_submits() -> None:
    """Those in flight are revalued, and the rest may be negative."""
    budget = learned(Budget(Decimal(2)))
    reservations = [budget.try_reserve(SMALL) for _ in range(3)]
    assert reservations[0] is not None
    reservations[0].settle(Decimal(1), is_success=True)
    assert budget.status().remaining == Decimal("-1.5")
    assert budget.try_reserve(SMALL) is None


def test_each_reservation_is_decided_exactly_once() -> None:
    """A second decision is a bug, and none is the safe one: held if it was sent, released if not."""
    budget = learned(Budget(Decimal(10)))
    for was_sent, reserved in ((False, Decimal(0)), (True, PRICE)):
        reservation = budget.try_reserve(SMALL)
        assert reservation is not None
        with reservation:
            reservation.was_sent = was_sent
        assert (budget.status().reserved, budget.open) == (reserved, set())
        for decide in (reservation.hold, reservation.release, lambda: reservation.settle(PRICE, is_success=True)):  # noqa: B023 - called here
            with pytest.raises(RuntimeError, match="expected one decision"):
                decide()


def test_a_budget_is_restored_from_the_ledger() -> None:
    """Spent, held and learned amounts are the same after a restart, and an open submit can still be settled."""
    budget = Budget(Decimal(10))
    attempt = partial(AttemptCost, model="m", image_size="1k")
    budget.add_attempts(
        [
            attempt(may_be_charged=True, consumed=PRICE, is_success=True),
            attempt(may_be_charged=True, consumed=None, is_success=False),
            attempt(may_be_charged=True, consumed=Decimal(2), is_success=False),
            attempt(may_be_charged=False, consumed=None, is_success=False),
        ]
    )
    assert (budget.status().spent, budget.status().reserved, budget.price(SMALL)) == (Decimal("2.5"), PRICE, PRICE)
    budget.reopen(SMALL).settle(PRICE, is_success=True)
    assert (budget.status().spent, budget.status().reserved) == (Decimal(3), Decimal(0))


class Ends(enum.Enum):
    """How a submit may end."""

    SUCCESS = "success, charge stated"
    UNSTATED = "success, charge not stated"
    FAILED = "failed, charge stated"
    FREE = "failed, charged zero"
    HELD = "may have been charged, and nothing more is known"
    NOT_CHARGED = "not charged"
    LEFT = "its block was left without a decision"


steps = st.lists(st.tuples(st.sampled_from([SMALL, LARGE, ("n", None)]), st.integers(0, 3), st.sampled_from(Ends)))
PRICES = {SMALL: Decimal("0.1"), LARGE: Decimal("1.2"), ("n", None): PRICE}


def end(reservation: Reservation, how: Ends, price: Decimal) -> Decimal:
    """End one submit and return what the service charged for it."""
    with reservation:
        reservation.was_sent = True
        match how:
            case Ends.SUCCESS | Ends.FAILED:
                reservation.settle(price, is_success=how is Ends.SUCCESS)
            case Ends.UNSTATED:
                reservation.settle(None, is_success=True)
            case Ends.FREE:
                reservation.settle(Decimal(0), is_success=False)
            case Ends.HELD:
                reservation.hold()
            case Ends.NOT_CHARGED:
                reservation.release()
            case Ends.LEFT:
                pass
    return Decimal(0) if how in (Ends.FREE, Ends.NOT_CHARGED) else price


@given(limit=st.decimals(Decimal("0.1"), 6, places=1), steps=steps, data=st.data())
def test_charges_exceed_the_budget_by_at_most_one_price(
    limit: Decimal, steps: list[tuple[PricedAs, int, Ends]], data: st.DataObject
) -> None:
    """At any moment, whatever the outcomes, and even if all that is in flight is charged."""
    budget, charged, in_flight = Budget(limit), Decimal(0), list[tuple[Reservation, PricedAs]]()
    for priced_as, starts, how in steps:
        for _ in range(starts):
            if (reservation := budget.try_reserve(priced_as)) is not None:
                in_flight.append((reservation, priced_as))
        if in_flight:
            reservation, pair = in_flight.pop(data.draw(st.integers(0, len(in_flight) - 1)))
            charged += end(reservation, how, PRICES[pair])
        assert charged + sum(PRICES[pair] for _, pair in in_flight) <= limit + max(PRICES.values())


@given(limit=st.decimals(1, 20, places=1), submits=st.integers(1, 30), rise=st.decimals(Decimal("0.1"), 3, places=1))
def test_a_price_that_rises_costs_at_most_the_rise_of_what_is_in_flight(
    limit: Decimal, submits: int, rise: Decimal
) -> None:
    """And no further submit leaves once the budget is exceeded."""
    budget = learned(Budget(limit))
    in_flight = [reservation for _ in range(submits) if (reservation := budget.try_reserve(SMALL)) is not None]
    charged = PRICE + sum(end(reservation, Ends.SUCCESS, PRICE + rise) for reservation in in_flight)
    assert charged <= limit + len(in_flight) * rise
    while (reservation := budget.try_reserve(SMALL)) is not None:
        charged += end(reservation, Ends.SUCCESS, PRICE + rise)
    assert charged <= limit + len(in_flight) * rise


def test_the_first_submits_go_one_at_a_time() -> None:
    """A wrong key or an outage then costs one row, not sixteen."""
    outage = OutageBackoff()
    assert outage.is_probing
    outage.record_success()
    assert not outage.is_probing


def test_submits_back_off_after_three_consecutive_failures() -> None:
    """The wait doubles up to five minutes and ends with the first success."""
    outage = OutageBackoff(Random(1))
    outage.record_success()
    for _ in range(2):
        outage.record_failure(0.0)
    assert (outage.is_probing, outage.backoff_s()) == (False, 0.0)
    pauses = []
    for _ in range(20):
        outage.record_failure(0.0)
        pauses.append(outage.backoff_s())
    assert outage.is_probing
    assert all(2.0**n / 2 <= pause <= 2.0**n for n, pause in enumerate(pauses[:8]))
    assert 150 <= pauses[-1] <= 300
    outage.record_success()
    assert (outage.is_probing, outage.backoff_s()) == (False, 0.0)


def test_a_run_that_has_worked_waits_for_an_hour() -> None:
    """A run without any success does not wait."""
    outage, other = OutageBackoff(), OutageBackoff()
    outage.record_success()
    for _ in range(3):
        outage.record_failure(100.0)
        other.record_failure(100.0)
    assert other.should_give_up(100.0, rate_limited=False)
    assert not outage.should_give_up(100.0 + GIVE_UP_AFTER_S, rate_limited=False)
    assert outage.should_give_up(101.0 + GIVE_UP_AFTER_S, rate_limited=False)
