"""Who may send now: a token bucket that Retry-After can hold shut, and the quota that keeps retries from piling up."""

import copy
import math
import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from random import Random
from typing import Final

import anyio

from nanobanana_async.errors import ApiError

MAX_RETRY_AFTER_S: Final = 300.0
"""What a Retry-After is clamped to: nobody sleeps for an hour on a typing error."""


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a reply asks to wait, in [0, 300]; None when it does not say, or says nonsense.

    A date is read against the reply's own `Date`, so that a wrong clock here changes nothing (RFC 9110, 10.2.3).
    """
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", value, re.ASCII):
        return min(float(value), MAX_RETRY_AFTER_S)
    then, now = _parse_http_date(value), _parse_http_date(headers.get("date", ""))
    if then is None:
        return None
    return min(max(then - (time.time() if now is None else now), 0.0), MAX_RETRY_AFTER_S)


def _parse_http_date(text: str) -> float | None:
    try:
        parsed = parsedate_to_datetime(text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None


class AdaptiveRateLimiter:
    """Lets *rate* requests per second through, at most *burst* at once, and none while the service wants quiet.

    First come, first served: the first in line sleeps, the others wait for it. The bucket is one number, the time at
    which it will be full again (the generic cell rate algorithm, as in ITU-T I.371).

    The rate gives way to trouble: `slow` takes off half the share of trouble among the last replies, so that a rare
    429 costs little and a wall of them half, down to one request per second (DCTCP: Alizadeh et al., 2010). Each
    success gives a little back, so that it recovers by a factor of e in ten seconds. While it is below its best, the
    gaps are left to chance by half, so that many clients that met the same trouble do not march in step.
    """

    def __init__(self, rate: float, burst: int, rng: Random | None = None) -> None:
        self._max_rate = rate
        self._min_rate = min(rate, _MIN_RATE)
        self._burst_tolerance_s = (burst - 1) / rate
        self._rng = rng or Random()
        self._tat_s = -math.inf
        self._paused_until_s = -math.inf
        self._last_throttle_s = -math.inf
        self._throttle_fraction = 0.0
        """The share of trouble among the last replies."""
        self._rate_before_throttle = rate
        """The rate before the present trouble."""
        self._lock = anyio.Lock(fast_acquire=True)
        self.rate = rate
        """Requests per second, as things stand."""

    async def acquire(self) -> None:
        """Return when one request may leave. Cancelling gives up the place in the line, at no cost to the others."""
        async with self._lock:
            # Asked again after each sleep, for a hush may have begun meanwhile.
            while (wait_s := self._tat_s - self._burst_tolerance_s - anyio.current_time()) > _ROUNDING_S:  # noqa: ASYNC110 - time passes by itself
                await anyio.sleep(wait_s + self._coalesce_s)
            self._tat_s = max(self._tat_s, anyio.current_time()) + self._interval_s()

    @property
    def _coalesce_s(self) -> float:
        """How long permits pile up before they are given out together: company saves CPU, see `DelayQueue`."""
        return min(_COALESCE_S, self._burst_tolerance_s / 2) if self.rate == self._max_rate else 0.0

    def _interval_s(self) -> float:
        return 1 / self.rate if self.rate == self._max_rate else self._rng.uniform(0.5, 1.5) / self.rate

    def pause(self, seconds: float) -> None:
        """Let nobody through for *seconds* from now, and no burst after that: one 429 slows everyone."""
        self._paused_until_s = max(self._paused_until_s, anyio.current_time() + seconds)
        self._tat_s = max(self._tat_s, self._paused_until_s + self._burst_tolerance_s)

    def record_throttle(self, sent_s: float) -> bool:
        """Note trouble with a request that left at *sent_s*.

        Returns whether it is news: requests that were under way together meet the same trouble, and slow once.
        """
        is_news = sent_s > self._last_throttle_s
        if is_news:
            self._last_throttle_s = anyio.current_time()
            self._rate_before_throttle = self.rate
        self._throttle_fraction += _EWMA_GAIN * (1 - self._throttle_fraction)
        self.rate = max(self._min_rate, min(self.rate, self._rate_before_throttle * (1 - self._throttle_fraction / 2)))
        return is_news

    def record_success(self) -> None:
        """Note a success."""
        self._throttle_fraction -= _EWMA_GAIN * self._throttle_fraction
        self.rate = min(self._max_rate, self.rate + _ADDITIVE_INCREASE)

    @property
    def pause_left_s(self) -> float:
        """How long the hush still lasts, in seconds; 0.0 when there is none."""
        return max(0.0, self._paused_until_s - anyio.current_time())


_ROUNDING_S: Final = 1e-6
_COALESCE_S: Final = 0.1
_MIN_RATE: Final = 1.0
_EWMA_GAIN: Final = 1 / 16
"""What one reply counts in the share of trouble; the value of that paper."""
_ADDITIVE_INCREASE: Final = 0.1
"""Requests per second that a success gives back."""


class CircuitBreaker:
    """Stops new submits after an answer that every further one would get: a refused key, an empty account.

    Only for definite causes; for passing trouble a breaker trips early and a quota does better.
    Every `PAUSE_S` one submit is let through to see whether the cause is gone, for a refusal costs nothing.
    """

    PROBE_INTERVAL_S: Final = 30.0

    def __init__(self) -> None:
        self._cause: ApiError | None = None
        self._open_until_s = -math.inf

    def check(self) -> None:
        """Raise the cause, at once and without asking the service, while there is one."""
        if self._cause is None:
            return
        now_s = anyio.current_time()
        if now_s < self._open_until_s:
            raise copy.copy(self._cause)
        self._open_until_s = now_s + self.PROBE_INTERVAL_S

    def trip(self, cause: ApiError) -> None:
        """Stop what has not been sent yet."""
        self._cause = copy.copy(cause)
        self._open_until_s = anyio.current_time() + self.PROBE_INTERVAL_S

    def reset(self) -> None:
        """Let submits through again: one was accepted."""
        self._cause = None


class RetryQuota:
    """Pays for retries out of what succeeds: under a total outage traffic tends to 1.0x instead of 3.0x.

    A retry costs `COST` tokens, a success earns one back. Source: the retry quota of the AWS SDKs ("standard" mode),
    with our own sizes; one per host, shared by everything safe to repeat.
    """

    CAPACITY: Final = 100
    COST: Final = 5

    def __init__(self) -> None:
        self._tokens = self.CAPACITY

    def acquire(self) -> bool:
        """Take the price of one retry; False when the quota is used up, and then the failure stands."""
        if self._tokens < self.COST:
            return False
        self._tokens -= self.COST
        return True

    def release(self) -> None:
        """Note a success."""
        self._tokens = min(self.CAPACITY, self._tokens + 1)
