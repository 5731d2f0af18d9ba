"""Money and caution: what a batch may still spend, and how it behaves while nothing works. Pure."""

from decimal import Decimal
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async.batch.outage import PATIENCE_S, OutageBackoff
from nanobanana_async.ledger.budget import Budget

PRICE = Decimal("0.5")


def test_without_a_budget_everything_is_allowed() -> None:
    """And counted all the same."""
    account = Budget()
    account.begin("m")
    account.end("m", PRICE)
    assert account.allows("m")
    assert (account.funds().spent, account.funds().left) == (PRICE, None)


def test_until_a_price_is_known_one_at_a_time_is_let_through() -> None:
    """The first one tells what the others cost."""
    account = Budget(Decimal(10))
    assert account.allows("m")
    account.begin("m")
    assert not account.allows("m")
    assert not account.allows("another model")
    account.end("m", PRICE)
    assert account.allows("m")
    assert account.allows("another model")
    account.begin("another model")
    assert not account.allows("another model")
    assert account.funds().reserved == PRICE


def test_what_is_in_flight_is_reserved_at_the_largest_price_seen() -> None:
    """So that it fits, whatever becomes of it."""
    account = Budget(Decimal(3))
    for consumed in (Decimal("0.2"), PRICE, Decimal("0.3")):
        account.begin("m")
        account.end("m", consumed)
    account.begin("m")
    assert account.funds().reserved == PRICE
    account.begin("m")
    account.begin("m")
    assert account.allows("m") is True
    account.begin("m")
    assert account.allows("m") is False
    account.end("m", None)
    assert account.allows("m") is True


@given(
    st.decimals(Decimal("0.5"), 20, places=2),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, Decimal("0.1"), Decimal("0.5"), Decimal("0.25")]))),
)
def test_the_budget_holds_whatever_comes(budget: Decimal, steps: list[tuple[int, Decimal | None]]) -> None:
    """Submits begin only when allowed, at prices never above the first, in any order of ends."""
    account, in_flight = Budget(budget), 0
    account.begin("m")
    account.end("m", PRICE)
    for starts, consumed in steps:
        for _ in range(starts):
            if account.allows("m"):
                account.begin("m")
                in_flight += 1
        if in_flight:
            account.end("m", consumed)
            in_flight -= 1
        funds = account.funds()
        assert funds.spent + funds.reserved <= budget
        assert funds.left == budget - funds.spent - funds.reserved


def test_an_account_is_made_again_from_what_the_ledger_holds() -> None:
    """What was spent, and what nobody knows the end of."""
    account = Budget.of([("m", 0, PRICE), ("m", 2, None), ("m", 1, PRICE)], Decimal(10))
    assert (account.funds().spent, account.funds().reserved) == (Decimal(1), Decimal("1.5"))


def test_the_first_submits_go_one_at_a_time() -> None:
    """A wrong key or an outage then costs one row, and not sixteen."""
    caution = OutageBackoff()
    assert caution.is_needed
    caution.worked()
    assert not caution.is_needed


def test_after_three_failures_in_a_row_submits_slow_down() -> None:
    """With pauses that double, up to five minutes, and end with the first success."""
    caution = OutageBackoff(Random(1))
    caution.worked()
    for _ in range(2):
        caution.failed(0.0)
    assert (caution.is_needed, caution.pause_s()) == (False, 0.0)
    pauses = []
    for _ in range(20):
        caution.failed(0.0)
        pauses.append(caution.pause_s())
    assert caution.is_needed
    assert all(2.0**n / 2 <= pause <= 2.0**n for n, pause in enumerate(pauses[:8]))
    assert 150 <= pauses[-1] <= 300
    caution.worked()
    assert (caution.is_needed, caution.pause_s()) == (False, 0.0)


def test_a_run_that_has_worked_waits_for_an_hour() -> None:
    """One that never has does not wait at all."""
    caution, other = OutageBackoff(), OutageBackoff()
    caution.worked()
    for _ in range(3):
        caution.failed(100.0)
        other.failed(100.0)
    assert other.is_hopeless(100.0, was_busy=False)
    assert not caution.is_hopeless(100.0 + PATIENCE_S, was_busy=False)
    assert caution.is_hopeless(101.0 + PATIENCE_S, was_busy=False)
