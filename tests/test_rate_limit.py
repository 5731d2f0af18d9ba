"""The rate limiter, the retry quota, and every form of Retry-After."""

from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, retry_after_s
from nanobanana_async.api.retry import RetryQuota

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
    """Values are clamped to five minutes, and a date is compared with the response's own Date."""
    assert retry_after_s({"retry-after": value, "date": DATE}) == expected


@given(value=st.text(max_size=40), date=st.text(max_size=40))
def test_any_retry_after_header_is_handled(value: str, date: str) -> None:
    """No text raises an error."""
    wait_s = retry_after_s({"retry-after": value, "date": date})
    assert wait_s is None or 0 <= wait_s <= 300


async def departures(limiter: AdaptiveRateLimiter, count: int) -> list[float]:
    """Return the times at which *count* concurrent callers acquire."""
    start_s, times_s = anyio.current_time(), []

    async def one() -> None:
        await limiter.acquire()
        times_s.append(anyio.current_time() - start_s)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
    return times_s


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_burst_leaves_at_once_and_the_rest_at_the_rate() -> None:
    """At 10/s with a burst of three, three leave at once, then small groups at the rate."""
    times_s = await departures(AdaptiveRateLimiter(10, 3), 8)
    assert times_s == pytest.approx([0, 0, 0, 0.2, 0.2, 0.4, 0.4, 0.6])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_without_a_burst_requests_leave_one_by_one() -> None:
    """Grouping uses the burst and never exceeds it."""
    assert await departures(AdaptiveRateLimiter(10, 1), 4) == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_idle_time_is_saved_up_to_the_burst() -> None:
    """An idle hour allows three requests at once, not thousands."""
    limiter = AdaptiveRateLimiter(10, 3)
    await departures(limiter, 5)
    await anyio.sleep(3600)
    assert await departures(limiter, 5) == pytest.approx([0, 0, 0, 0.2, 0.2])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_pause_blocks_all_requests_and_ends_without_a_burst() -> None:
    """After a 429, waiting requests leave at the rate."""
    limiter = AdaptiveRateLimiter(10, 3)
    limiter.pause(5)
    assert await departures(limiter, 6) == pytest.approx([5.1, 5.1, 5.3, 5.3, 5.5, 5.5])


async def throttle_to_minimum(limiter: AdaptiveRateLimiter) -> None:
    """Lower the rate to its minimum."""
    for _ in range(20):
        await anyio.sleep(1)
        limiter.record_throttle(anyio.current_time())


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_throttles_of_one_round_lower_the_rate_once() -> None:
    """Sixty-four 429s to requests sent together count as one."""
    limiter = AdaptiveRateLimiter(64, 8)
    sent_s = anyio.current_time()
    await anyio.sleep(1)
    assert [limiter.record_throttle(sent_s) for _ in range(64)].count(True) == 1
    assert limiter.rate == pytest.approx(32, rel=0.02)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_rare_429_costs_little_and_frequent_ones_much() -> None:
    """The rate settles in proportion to the fraction of errors."""
    rates = {}
    for share in (50, 2):
        limiter = AdaptiveRateLimiter(300, 1)
        for number in range(3000):
            await anyio.sleep(1 / limiter.rate)
            if number % share:
                limiter.record_success()
            else:
                limiter.record_throttle(anyio.current_time() - 1e-3)
        rates[share] = limiter.rate
    assert rates[50] > 100
    assert rates[2] < 10


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_the_rate_never_falls_below_one_request_per_second() -> None:
    """Some requests have to find out that the throttling has ended."""
    limiter = AdaptiveRateLimiter(64, 8)
    await throttle_to_minimum(limiter)
    assert limiter.rate == 1
    await limiter.acquire()
    times_s = await departures(limiter, 60)
    assert 40 <= times_s[-1] <= 80


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_the_rate_recovers_by_a_factor_of_e_in_ten_seconds() -> None:
    """Successes raise the rate, so an unavailable service gets no more requests."""
    limiter = AdaptiveRateLimiter(100, 8)
    await throttle_to_minimum(limiter)
    start_s, rates = anyio.current_time(), []
    while limiter.rate < 100:
        await limiter.acquire()
        limiter.record_success()
        rates.append((anyio.current_time() - start_s, limiter.rate))
    at_ten = min(rates, key=lambda point: abs(point[0] - 10))[1]
    assert 2 <= at_ten <= 4
    assert 35 <= rates[-1][0] <= 60


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_throttled_clients_do_not_stay_in_step() -> None:
    """Half of each interval is random below the maximum rate."""
    gaps: list[set[float]] = []
    for seed in (1, 2):
        limiter = AdaptiveRateLimiter(10, 1, Random(seed))
        limiter.record_throttle(anyio.current_time())
        gaps.append({round(time_s, 3) for time_s in await departures(limiter, 20)})
    assert len(gaps[0] & gaps[1]) <= 3


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_pause_also_delays_requests_that_are_waiting() -> None:
    """A request that is already waiting does not leave during the pause."""
    limiter = AdaptiveRateLimiter(10, 1)
    async with anyio.create_task_group() as group:
        times_s: list[float] = []

        async def wait_in_line() -> None:
            times_s.extend(await departures(limiter, 4))

        group.start_soon(wait_in_line)
        await anyio.sleep(0.15)
        limiter.pause(10)
    assert times_s[:2] == pytest.approx([0, 0.1])
    assert min(times_s[2:]) >= 10.15 - 1e-6
    assert abs(times_s[3] - times_s[2]) == pytest.approx(0.1)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_cancelled_waiters_do_not_delay_others() -> None:
    """A thousand cancelled callers use none of the rate."""
    limiter = AdaptiveRateLimiter(10, 1)
    await limiter.acquire()
    for _ in range(1000):
        with anyio.move_on_after(0.00001):
            await limiter.acquire()
    assert await departures(limiter, 2) == pytest.approx([0.09, 0.19])


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_no_second_ever_sees_more_than_rate_plus_burst() -> None:
    """This holds for any mixture of waiting, cancelling and pausing."""
    limiter = AdaptiveRateLimiter(20, 5)
    times_s: list[float] = []

    async def one(delay_s: float, timeout_s: float) -> None:
        await anyio.sleep(delay_s)
        with anyio.move_on_after(timeout_s):
            await limiter.acquire()
            times_s.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        for number in range(300):
            group.start_soon(one, number % 7, 0.1 + number % 11)
        await anyio.sleep(3)
        limiter.pause(2)
    times_s.sort()
    assert len(times_s) > 100
    for start in times_s:
        assert sum(start <= time < start + 1 for time in times_s) <= 25


def test_successes_refill_the_retry_quota() -> None:
    """In a total outage the quota is used up; each success returns a fifth of a retry."""
    quota = RetryQuota()
    assert sum(quota.acquire() for _ in range(1000)) == RetryQuota.CAPACITY // RetryQuota.COST
    for _ in range(RetryQuota.COST):
        quota.release()
    assert [quota.acquire(), quota.acquire()] == [True, False]
