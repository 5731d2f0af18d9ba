"""The rate limiter, the retry quota, and every form of Retry-After."""

from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async.api.concurrency import AdaptiveLimit
from nanobanana_async.api.rate_limit import AdaptiveRateLimiter, asked_wait_s, retry_after_s
from nanobanana_async.api.retry import RetryQuota
from tests.fakes import response

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


async def accept(limiter: AdaptiveRateLimiter, per_s: int) -> None:
    """Let requests be accepted for two seconds."""
    for _ in range(2 * per_s):
        limiter.record_accepted()
        await anyio.sleep(1 / per_s)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_429_sets_the_rate_to_most_of_what_was_accepted() -> None:
    """Sixty-four 429s to requests sent together count as one."""
    limiter = AdaptiveRateLimiter(300, 30)
    await accept(limiter, 20)
    sent_s = anyio.current_time()
    await anyio.sleep(0.001)
    assert [limiter.record_throttle(sent_s) for _ in range(64)].count(True) == 1
    assert limiter.rate == pytest.approx(18, rel=0.1)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_without_an_accepted_request_a_429_halves_the_rate() -> None:
    """At the start there is no response yet that says what the service accepts."""
    limiter = AdaptiveRateLimiter(64, 8)
    for expected in (32, 16.2, 8.2):
        await anyio.sleep(0.01)
        assert limiter.record_throttle(anyio.current_time())
        assert limiter.rate == pytest.approx(expected, rel=0.05)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_the_rate_never_falls_below_one_request_in_two_seconds() -> None:
    """Some requests have to find out that the throttling has ended."""
    limiter = AdaptiveRateLimiter(64, 8)
    for _ in range(200):
        await anyio.sleep(0.01)
        limiter.record_throttle(anyio.current_time())
    assert limiter.rate == pytest.approx(0.5, abs=0.05)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_the_rate_grows_by_three_percent_per_second() -> None:
    """It grows with time and not with requests, up to the maximum."""
    limiter = AdaptiveRateLimiter(100, 8)
    await accept(limiter, 20)
    limiter.record_throttle(anyio.current_time())
    await anyio.sleep(10)
    assert limiter.rate == pytest.approx(18 * 1.3, rel=0.1)
    await anyio.sleep(1000)
    assert limiter.rate == 100


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_after_an_outage_successes_raise_the_rate_and_time_does_not() -> None:
    """An unavailable service gets no more requests, and an available one a factor of e more in ten seconds."""
    limiter = AdaptiveRateLimiter(100, 8)
    for _ in range(20):
        await anyio.sleep(1)
        limiter.record_failure(anyio.current_time())
    await anyio.sleep(1000)
    assert limiter.rate == 1
    start_s = anyio.current_time()
    while limiter.rate < 100:
        await limiter.acquire()
        limiter.record_accepted()
    assert 35 <= anyio.current_time() - start_s <= 60


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"retry_after": 7}, 7.0, id="top"),
        pytest.param({"code": 429, "data": {"retry_after": "1.5"}}, 1.5, id="in-data"),
        pytest.param({"error": {"retry_after": 2.25}}, 2.25, id="in-error"),
        pytest.param({"retry_after": True}, None, id="boolean"),
        pytest.param({"retry_after": -3}, None, id="negative"),
        pytest.param(["retry_after"], None, id="list"),
    ],
)
def test_the_wait_may_stand_in_the_body(body: object, expected: float | None) -> None:
    """A header comes before it."""
    assert asked_wait_s(response(429, body)) == expected
    assert asked_wait_s(response(429, body, retry_after="9")) == 9.0


def test_the_number_of_submits_doubles_per_round_and_shrinks_with_the_share_of_errors() -> None:
    """One error in a hundred costs little, and failing for all ends at the floor."""
    limit = AdaptiveLimit(256)
    assert limit.value == 32
    for number in range(400):
        limit.record(is_error=number % 100 == 50, elapsed_s=0.8, size_bytes=300)
    assert limit.value > 240
    for _ in range(400):
        limit.record(is_error=True, elapsed_s=0.8, size_bytes=300)
    assert limit.value == 16
    for _ in range(64):
        limit.record(is_error=False, elapsed_s=0.8, size_bytes=300)
    assert 18 <= limit.value <= 20, "by one per round, after many errors"


def test_the_number_of_submits_does_not_grow_while_they_only_wait_elsewhere() -> None:
    """Response times rise when the service queues. An upload of megabytes takes its time and is no sign of that."""
    limit = AdaptiveLimit(256)
    for _ in range(32):
        limit.record(is_error=False, elapsed_s=0.5, size_bytes=300)
    for _ in range(16):
        limit.record(is_error=False, elapsed_s=9.0, size_bytes=50_000_000)
    grown = limit.value
    for _ in range(200):
        limit.record(is_error=False, elapsed_s=2.0, size_bytes=300)
    assert limit.value <= grown + 16
    assert AdaptiveLimit(4).value == 4


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_throttled_clients_do_not_stay_in_step() -> None:
    """A tenth of each interval is random below the maximum rate."""
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
