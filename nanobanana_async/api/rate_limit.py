"""Rate limiter: when a request may be sent."""

import math
import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from random import Random, SystemRandom
from typing import Final

import anyio

MAX_RETRY_AFTER_S: Final = 300.0
"""Upper bound of a Retry-After, against absurd values."""


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait, in [0, 300]; None if it has no valid Retry-After.

    A date is compared with the response's own `Date`, so a wrong local clock has no effect (RFC 9110, 10.2.3).
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
    """Allows *rate* requests per second, at most *burst* at once, and none during a pause.

    Callers are served in FIFO order: the first one sleeps, the others wait for it. The bucket is one number, the time
    at which it will be full again (generic cell rate algorithm, ITU-T I.371).

    `record_throttle` lowers the rate by half the fraction of errors among the last responses, down to one request per
    second. A rare 429 costs little, and a series of them half the rate (DCTCP: Alizadeh et al., 2010). Each success
    raises it a little, so it recovers by a factor of e in ten seconds. Below the maximum rate half of each interval is
    random, so that clients that were throttled together do not stay in step.
    """

    def __init__(self, rate: float, burst: int, rng: Random | None = None) -> None:
        self._max_rate = rate
        self._min_rate = min(rate, _MIN_RATE)
        self._burst_tolerance_s = (burst - 1) / rate
        self._rng = rng or SystemRandom()
        self._tat_s = -math.inf
        self._paused_until_s = -math.inf
        self._last_throttle_s = -math.inf
        self._throttle_fraction = 0.0
        """Fraction of errors among the last responses (EWMA)."""
        self._rate_before_throttle = rate
        """The rate before the current series of errors."""
        self._lock = anyio.Lock(fast_acquire=True)
        self.rate = rate
        """Current rate in requests per second."""

    async def acquire(self) -> None:
        """Return when one request may be sent. Cancelling gives up the place in the queue without delaying others."""
        async with self._lock:
            # Checked again after each sleep, because a pause may have begun meanwhile.
            while (wait_s := self._tat_s - self._burst_tolerance_s - anyio.current_time()) > _ROUNDING_S:  # noqa: ASYNC110 - the condition is the clock
                await anyio.sleep(wait_s + self._coalesce_s)
            self._tat_s = max(self._tat_s, anyio.current_time()) + self._interval_s()

    @property
    def _coalesce_s(self) -> float:
        """How long permissions are collected and then given together, which saves CPU (see `DelayQueue`)."""
        return min(_COALESCE_S, self._burst_tolerance_s / 2) if self.rate == self._max_rate else 0.0

    def _interval_s(self) -> float:
        return 1 / self.rate if self.rate == self._max_rate else self._rng.uniform(0.5, 1.5) / self.rate

    def pause(self, seconds: float) -> None:
        """Block all requests for *seconds*, then start without a burst. Called after a 429."""
        self._paused_until_s = max(self._paused_until_s, anyio.current_time() + seconds)
        self._tat_s = max(self._tat_s, self._paused_until_s + self._burst_tolerance_s)

    def record_throttle(self, sent_s: float) -> bool:
        """Record an error for a request sent at *sent_s*, and lower the rate.

        Returns whether it starts a new series of errors. Requests in flight together count as one.
        """
        is_new_series = sent_s > self._last_throttle_s
        if is_new_series:
            self._last_throttle_s = anyio.current_time()
            self._rate_before_throttle = self.rate
        self._throttle_fraction += _EWMA_GAIN * (1 - self._throttle_fraction)
        self.rate = max(self._min_rate, min(self.rate, self._rate_before_throttle * (1 - self._throttle_fraction / 2)))
        return is_new_series

    def record_success(self) -> None:
        """Record a success, and raise the rate."""
        self._throttle_fraction -= _EWMA_GAIN * self._throttle_fraction
        self.rate = min(self._max_rate, self.rate + _ADDITIVE_INCREASE)

    @property
    def pause_left_s(self) -> float:
        """Remaining time of the pause in seconds; 0.0 if there is none."""
        return max(0.0, self._paused_until_s - anyio.current_time())


_ROUNDING_S: Final = 1e-6
_COALESCE_S: Final = 0.1
_MIN_RATE: Final = 1.0
_EWMA_GAIN: Final = 1 / 16
"""Weight of one response in the fraction of errors. The value is that of the DCTCP paper."""
_ADDITIVE_INCREASE: Final = 0.1
"""Increase of the rate per success, in requests per second."""
