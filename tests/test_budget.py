"""The budget of a batch, and its behaviour in an outage. Pure."""

from decimal import Decimal
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async.batch.outage import GIVE_UP_AFTER_S, OutageBackoff
from nanobanana_async.ledger.budget import Budget

PRICE = Decimal("0.5")


def test_without_a_budget_everything_is_allowed() -> None:
    """Without a budget every submit is allowed and still counted."""
    account = Budget()
    account.reserve("m")
    account.settle("m", PRICE)
    assert account.can_reserve("m")
    assert (account.status().spent, account.status().remaining) == (PRICE, None)


def test_submits_go_one_at_a_time_until_a_price_is_known() -> None:
    """The first submit shows the price of the others."""
    account = Budget(Decimal(10))
    assert account.can_reserve("m")
    account.reserve("m")
    assert not account.can_reserve("m")
    assert not account.can_reserve("another model")
    account.settle("m", PRICE)
    assert account.can_reserve("m")
    assert account.can_reserve("another model")
    account.reserve("another model")
    assert not account.can_reserve("another model")
    assert account.status().reserved == PRICE


def test_submits_in_flight_are_reserved_at_the_largest_price() -> None:
    """The reservation covers every possible outcome."""
    account = Budget(Decimal(3))
    for consumed in (Decimal("0.2"), PRICE, Decimal("0.3")):
        account.reserve("m")
        account.settle("m", consumed)
    account.reserve("m")
    assert account.status().reserved == PRICE
    account.reserve("m")
    account.reserve("m")
    assert account.can_reserve("m") is True
    account.reserve("m")
    assert account.can_reserve("m") is False
    account.settle("m", None)
    assert account.can_reserve("m") is True


@given(
    st.decimals(Decimal("0.5"), 20, places=2),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, Decimal("0.1"), Decimal("0.5"), Decimal("0.25")]))),
)
def test_the_budget_holds_for_any_sequence_of_outcomes(
    budget: Decimal, steps: list[tuple[int, Decimal | None]]
) -> None:
    """If prices never exceed the first one, spending never exceeds the budget."""
    account, in_flight = Budget(budget), 0
    account.reserve("m")
    account.settle("m", PRICE)
    for starts, consumed in steps:
        for _ in range(starts):
            if account.can_reserve("m"):
                account.reserve("m")
                in_flight += 1
        if in_flight:
            account.settle("m", consumed)
            in_flight -= 1
        funds = account.status()
        assert funds.spent + funds.reserved <= budget
        assert funds.remaining == budget - funds.spent - funds.reserved


def test_a_budget_is_restored_from_the_ledger() -> None:
    """Spent and possible charges are the same after a restart."""
    account = Budget.from_attempts([("m", 0, PRICE), ("m", 2, None), ("m", 1, PRICE)], Decimal(10))
    assert (account.status().spent, account.status().reserved) == (Decimal(1), Decimal("1.5"))


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
