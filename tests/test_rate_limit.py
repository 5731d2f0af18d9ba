"""Who may send, and when: the bucket, the hush, the quota, and every spelling of Retry-After."""

from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, RetryQuota, retry_after_s

DATE = "Sat, 21 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("7", 7.0, id="seconds"),
        pytest.param(" 1.5 ", 1.5, id="fraction"),
        pytest.param("Sat, 21 Nov 2026 12:00:30 GMT", 30.0, id="date"),
        pytest.param("Sat, 21 Nov 2026 11:00:00 GMT", 0.0, id="past-date"),
        pytest.param("1000000000", 300.0, id="a-typing-error-of-thirty-years"),
        pytest.param("Sat, 21 Nov 2099 12:00:00 GMT", 300.0, id="far-date"),
        pytest.param("Mon, 01 Jan 2026 00:00:00 +99999999999999999999", None, id="impossible-zone"),
        pytest.param("-5", None, id="negative"),
        pytest.param("nan", None, id="nan"),
        pytest.param("1e9", None, id="exponent"),
        pytest.param("5, 10", None, id="two-values"),
        pytest.param("soon", None, id="words"),
        pytest.param("", None, id="empty"),
    ],
)
def test_retry_after_is_seconds_a_date_or_ignored(value: str, expected: float | None) -> None:
    """Clamped to five minutes; a date is read against the reply's own clock."""
    assert retry_after_s({"retry-after": value, "date": DATE}) == expected


@given(value=st.text(max_size=40), date=st.text(max_size=40))
def test_no_header_breaks_the_reader(value: str, date: str) -> None:
    """Whatever a proxy writes there."""
    wait_s = retry_after_s({"retry-after": value, "date": date})
    assert wait_s is None or 0 <= wait_s <= 300


async def departures(pacer: AdaptiveRateLimiter, count: int) -> list[float]:
    """Return when each of *count* impatient callers got through, from now."""
    start_s, times_s = anyio.current_time(), []

    async def one() -> None:
        await pacer.acquire()
        times_s.append(anyio.current_time() - start_s)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
    return times_s


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_burst_leaves_at_once_and_the_rest_at_the_rate() -> None:
    """Ten per second, three at once: 0, 0, 0, then ten a second in company, at most half a burst of it."""
    times_s = await departures(AdaptiveRateLimiter(10, 3), 8)
    assert times_s == pytest.approx([0, 0, 0, 0.2, 0.2, 0.4, 0.4, 0.6])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_without_a_burst_they_leave_one_by_one() -> None:
    """Company is a use of the burst, not an addition to it."""
    assert await departures(AdaptiveRateLimiter(10, 1), 4) == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_quiet_time_is_saved_up_to_the_burst_and_no_further() -> None:
    """An hour of silence buys three requests, not thirty-six thousand."""
    pacer = AdaptiveRateLimiter(10, 3)
    await departures(pacer, 5)
    await anyio.sleep(3600)
    assert await departures(pacer, 5) == pytest.approx([0, 0, 0, 0.2, 0.2])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_hush_stops_everyone_and_ends_without_a_herd() -> None:
    """After a 429, those who waited go out at the rate, not in a burst."""
    pacer = AdaptiveRateLimiter(10, 3)
    pacer.pause(5)
    assert await departures(pacer, 6) == pytest.approx([5.1, 5.1, 5.3, 5.3, 5.5, 5.5])


async def wear_down(pacer: AdaptiveRateLimiter) -> None:
    """Bring the rate to its lowest."""
    for _ in range(20):
        await anyio.sleep(1)
        pacer.record_throttle(anyio.current_time())


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_trouble_halves_the_rate_once_however_many_requests_met_it() -> None:
    """Sixty-four answers of 429 to requests sent together are one piece of news."""
    pacer = AdaptiveRateLimiter(64, 8)
    sent_s = anyio.current_time()
    await anyio.sleep(1)
    assert [pacer.record_throttle(sent_s) for _ in range(64)].count(True) == 1
    assert pacer.rate == pytest.approx(32, rel=0.02)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_rare_429_costs_little_and_frequent_ones_much() -> None:
    """The rate settles where the share of trouble is, and not at a trickle because of one answer in fifty."""
    rates = {}
    for share in (50, 2):
        pacer = AdaptiveRateLimiter(300, 1)
        for number in range(3000):
            await anyio.sleep(1 / pacer.rate)
            if number % share:
                pacer.record_success()
            else:
                pacer.record_throttle(anyio.current_time() - 1e-3)
        rates[share] = pacer.rate
    assert rates[50] > 100
    assert rates[2] < 10


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_under_lasting_trouble_the_rate_ends_at_one_request_a_second_and_not_at_none() -> None:
    """Somebody has to find out that it is over."""
    pacer = AdaptiveRateLimiter(64, 8)
    await wear_down(pacer)
    assert pacer.rate == 1
    await pacer.acquire()
    times_s = await departures(pacer, 60)
    assert 40 <= times_s[-1] <= 80


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_after_trouble_the_rate_comes_back_by_a_factor_of_e_in_ten_seconds() -> None:
    """Successes give it back, so a service that stays away gets no more requests."""
    pacer = AdaptiveRateLimiter(100, 8)
    await wear_down(pacer)
    start_s, rates = anyio.current_time(), []
    while pacer.rate < 100:
        await pacer.acquire()
        pacer.record_success()
        rates.append((anyio.current_time() - start_s, pacer.rate))
    at_ten = min(rates, key=lambda point: abs(point[0] - 10))[1]
    assert 2 <= at_ten <= 4
    assert 35 <= rates[-1][0] <= 60


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_clients_that_met_the_same_trouble_do_not_march_in_step() -> None:
    """Gaps are left to chance while the rate is below its best."""
    gaps: list[set[float]] = []
    for seed in (1, 2):
        pacer = AdaptiveRateLimiter(10, 1, Random(seed))
        pacer.record_throttle(anyio.current_time())
        gaps.append({round(time_s, 3) for time_s in await departures(pacer, 20)})
    assert len(gaps[0] & gaps[1]) <= 3


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_hush_also_reaches_those_already_in_line() -> None:
    """They had been promised a time within it."""
    pacer = AdaptiveRateLimiter(10, 1)
    async with anyio.create_task_group() as group:
        times_s: list[float] = []

        async def wait_in_line() -> None:
            times_s.extend(await departures(pacer, 4))

        group.start_soon(wait_in_line)
        await anyio.sleep(0.15)
        pacer.pause(10)
    assert times_s[:2] == pytest.approx([0, 0.1])
    assert min(times_s[2:]) >= 10.15 - 1e-6
    assert abs(times_s[3] - times_s[2]) == pytest.approx(0.1)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_those_who_leave_the_line_cost_the_others_nothing() -> None:
    """A thousand impatient callers must not book the next hundred seconds."""
    pacer = AdaptiveRateLimiter(10, 1)
    await pacer.acquire()
    for _ in range(1000):
        with anyio.move_on_after(0.00001):
            await pacer.acquire()
    assert await departures(pacer, 2) == pytest.approx([0.09, 0.19])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_no_second_ever_sees_more_than_rate_plus_burst() -> None:
    """Whatever the mixture of waiting, cancelling and hushing."""
    pacer = AdaptiveRateLimiter(20, 5)
    times_s: list[float] = []

    async def one(delay_s: float, patience_s: float) -> None:
        await anyio.sleep(delay_s)
        with anyio.move_on_after(patience_s):
            await pacer.acquire()
            times_s.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        for number in range(300):
            group.start_soon(one, number % 7, 0.1 + number % 11)
        await anyio.sleep(3)
        pacer.pause(2)
    times_s.sort()
    assert len(times_s) > 100
    for start in times_s:
        assert sum(start <= time < start + 1 for time in times_s) <= 25


def test_retries_are_paid_for_by_successes() -> None:
    """Under a total outage the quota runs dry; each success buys a fifth of a retry."""
    quota = RetryQuota()
    assert sum(quota.acquire() for _ in range(1000)) == RetryQuota.CAPACITY // RetryQuota.COST
    for _ in range(RetryQuota.COST):
        quota.release()
    assert [quota.acquire(), quota.acquire()] == [True, False]
